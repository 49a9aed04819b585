//! Every kind of memory: what can be mapped how, and that the bytes are right both ways.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ioas::caller::FileKind;
use ioas::{
    Access, Accounting, FaultReason, Ioas, IoasError, Iova, IovaChoice, IovaRange, IpcLock, MapRequest, PAGE_SIZE,
    PageStore, PayerMode, Source, UserAddr, errno,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags};

use crate::process::{Client, look_at, memfd, named, named_as, skipped};
use crate::sys::{Mapping, secret_memfd};
use crate::table::{MapTable, range};

pub(crate) const RW: Access = Access::READ.union(Access::WRITE);
pub(crate) const PROT_RW: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

pub(crate) fn user(address: u64, pages: u64, iova: u64, access: Access) -> MapRequest {
    request(Source::User(UserAddr(address)), pages, iova, access)
}

pub(crate) fn request(source: Source, pages: u64, iova: u64, access: Access) -> MapRequest {
    MapRequest {
        source,
        length: pages * PAGE_SIZE,
        iova: IovaChoice::Fixed(Iova(iova)),
        access,
        payer: PayerMode::MemoryMap,
        ipc_lock: IpcLock::DoNotCount,
        device_regions: false,
    }
}

pub(crate) struct Bench {
    pub(crate) store: Arc<PageStore>,
    pub(crate) ioas: Arc<Ioas>,
    pub(crate) table: Arc<MapTable>,
    pub(crate) client: Client,
}

impl Bench {
    /// An IOAS with one table.
    pub(crate) fn new() -> Self {
        let bench = Self::without_table();
        bench.ioas.add_table(bench.table.clone()).expect("an empty IOAS takes a table");
        bench
    }

    pub(crate) fn without_table() -> Self {
        let store = PageStore::new(Accounting::Once);
        Self { ioas: Ioas::new(store.clone()), store, table: MapTable::new(), client: Client::new(1) }
    }

    pub(crate) fn map(&self, request: MapRequest) -> Result<IovaRange, IoasError> {
        self.ioas.map(&self.client, request)
    }

    pub(crate) fn fault(&self, request: MapRequest) -> FaultReason {
        match self.map(request) {
            Err(IoasError::Fault { reason, .. }) => reason,
            other => panic!("expected EFAULT, not {other:?}"),
        }
    }

    pub(crate) fn held(&self) -> u64 {
        self.store.snapshot().held_bytes
    }

    pub(crate) fn charged(&self) -> u64 {
        self.store.snapshot().payers.iter().map(|payer| payer.charged_bytes).sum()
    }

    pub(crate) fn assert_empty(&self) {
        let snapshot = self.store.snapshot();
        assert_eq!(snapshot.held_bytes, 0);
        assert!(snapshot.backings.is_empty() && snapshot.payers.is_empty(), "{snapshot:?}");
    }

    /// Writes through the table and reads back, at `pages` pages from `iova` on; the client sees it in `mapping`.
    fn both_ways(&self, mapping: &Mapping, pages: u64, iova: u64) {
        for page in 0..pages {
            let offset = (page * PAGE_SIZE) as usize + 100;
            mapping.set(offset + 1, 0xcc);
            self.table.dma_write(&self.store, iova + offset as u64, &[page as u8 + 1]).expect("written");
            assert_eq!(mapping.byte(offset), page as u8 + 1);
            let mut data = [0; 2];
            self.table.dma_read(&self.store, iova + offset as u64, &mut data).expect("read");
            assert_eq!(data, [page as u8 + 1, 0xcc]);
        }
    }
}

#[test]
fn memfd_shared_mapped_by_address_moves_bytes_both_ways() {
    let bench = Bench::new();
    let mapping = Mapping::of_file(&memfd(4 * PAGE_SIZE), 4, PROT_RW, MapFlags::MAP_SHARED);
    bench.map(user(mapping.address(), 4, 0x10000, RW)).expect("mapped");
    bench.both_ways(&mapping, 4, 0x10000);
    assert_eq!((bench.held(), bench.charged()), (4 * PAGE_SIZE, 4 * PAGE_SIZE));
    assert_eq!(bench.store.snapshot().backings[0].kind, "shmem");
    assert_eq!(bench.ioas.unmap(range(0x10000, 0x4000)), Ok(0x4000));
    bench.assert_empty();
}

#[test]
fn memfd_by_descriptor_and_by_address_is_one_page_held_once() {
    let bench = Bench::new();
    let file = memfd(2 * PAGE_SIZE);
    let mapping = Mapping::of_file(&file, 2, PROT_RW, MapFlags::MAP_SHARED);
    bench.map(user(mapping.address(), 2, 0, RW)).expect("mapped");
    let by_fd = Source::File { file: named(&file, true), offset: PAGE_SIZE };
    bench.map(request(by_fd, 1, 0x10000, RW)).expect("mapped");
    assert_eq!(bench.table.walk(0x1000), bench.table.walk(0x10000));
    assert_eq!((bench.held(), bench.charged()), (2 * PAGE_SIZE, 2 * PAGE_SIZE));
    bench.ioas.unmap(IovaRange::everything()).expect("unmapped");
    bench.assert_empty();
}

#[test]
fn shared_anonymous_memory_moves_bytes_both_ways() {
    let bench = Bench::new();
    let mapping = Mapping::anonymous(3, PROT_RW, MapFlags::MAP_SHARED);
    bench.map(user(mapping.address(), 3, 0, RW)).expect("mapped");
    bench.both_ways(&mapping, 3, 0);
    assert_eq!(bench.store.snapshot().backings[0].kind, "shmem");
}

#[test]
fn shared_memory_without_privilege_is_reached_as_private() {
    let bench = Bench::new();
    bench.client.memory.unprivileged.store(true, Ordering::Relaxed);
    let mapping = Mapping::anonymous(3, PROT_RW, MapFlags::MAP_SHARED);
    bench.map(user(mapping.address(), 3, 0, RW)).expect("mapped");
    bench.both_ways(&mapping, 3, 0);
    assert_eq!(bench.store.snapshot().backings[0].kind, "private");
}

#[test]
fn private_anonymous_memory_moves_bytes_both_ways() {
    let bench = Bench::new();
    let mapping = Mapping::private(3);
    bench.map(user(mapping.address(), 3, 0, RW)).expect("mapped");
    bench.both_ways(&mapping, 3, 0);
    assert_eq!(bench.store.snapshot().backings[0].kind, "private");
    assert_eq!(bench.held(), 3 * PAGE_SIZE);
}

#[test]
fn private_file_mapping_never_reaches_the_file() {
    let bench = Bench::new();
    let file = memfd(PAGE_SIZE);
    let mapping = Mapping::of_file(&file, 1, PROT_RW, MapFlags::MAP_PRIVATE);
    bench.map(user(mapping.address(), 1, 0, RW)).expect("mapped");
    bench.both_ways(&mapping, 1, 0);
    let shared = Mapping::of_file(&file, 1, PROT_RW, MapFlags::MAP_SHARED);
    assert_eq!(shared.byte(100), 0, "the file is as it was");
}

#[test]
fn read_only_mapping_is_refused_writeable_and_taken_readable() {
    let bench = Bench::new();
    let file = memfd(PAGE_SIZE);
    let mapping = Mapping::of_file(&file, 1, ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
    assert_eq!(bench.fault(user(mapping.address(), 1, 0, RW)), FaultReason::NotWritable);
    bench.assert_empty();
    bench.map(user(mapping.address(), 1, 0, Access::READ)).expect("mapped");
    bench.table.dma_read(&bench.store, 0, &mut [0; 8]).expect("read");
    let (frame, ..) = bench.table.walk(0).expect("mapped");
    assert!(bench.store.write(frame, 0, &[1]).is_err(), "the server has no right that the client lacks");
}

#[test]
fn read_only_file_improved_by_a_writable_mapping_is_written() {
    let bench = Bench::new();
    let file = memfd(PAGE_SIZE);
    let reader = Mapping::of_file(&file, 1, ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
    bench.map(user(reader.address(), 1, 0, Access::READ)).expect("mapped");
    bench.table.dma_read(&bench.store, 0, &mut [0; 8]).expect("read");
    let writer = Mapping::of_file(&file, 1, PROT_RW, MapFlags::MAP_SHARED);
    bench.map(user(writer.address(), 1, 0x1000, RW)).expect("mapped");
    bench.table.dma_write(&bench.store, 0x1000, &[7]).expect("written");
    assert_eq!(reader.byte(0), 7);
}

#[test]
fn writeback_file_shared_is_refused_writeable_and_taken_readable() {
    let bench = Bench::new();
    let directory = std::env::current_dir().expect("a directory");
    let named = tempfile::tempfile_in(directory).expect("a file");
    named.set_len(PAGE_SIZE).expect("a size");
    if look_at(named.try_clone().expect("a descriptor").into(), true).kind != FileKind::Writeback {
        return skipped("the working directory is on a tmpfs");
    }
    let mapping = Mapping::of_file(&named, 1, PROT_RW, MapFlags::MAP_SHARED);
    let reason = bench.fault(user(mapping.address(), 1, 0, RW));
    assert!(matches!(reason, FaultReason::Writeback(_)), "{reason}");
    bench.map(user(mapping.address(), 1, 0, Access::READ)).expect("mapped");
    mapping.set(5, 9);
    let mut data = [0];
    bench.table.dma_read(&bench.store, 5, &mut data).expect("read");
    assert_eq!(data, [9]);
}

#[test]
fn hole_and_no_access_are_refused() {
    let bench = Bench::new();
    let mapping = Mapping::private(3);
    mapping.punch(1);
    let error = bench.map(user(mapping.address(), 3, 0, RW)).expect_err("a hole");
    assert_eq!(error.errno(), errno::EFAULT);
    assert!(error.to_string().contains(&format!("{:#x}", mapping.address() + PAGE_SIZE)), "{error}");
    let none = Mapping::anonymous(1, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE);
    assert_eq!(bench.fault(user(none.address(), 1, 0, Access::READ)), FaultReason::NotReadable);
    bench.assert_empty();
}

#[test]
fn memfd_secret_is_refused() {
    let bench = Bench::new();
    let Some(file) = secret_memfd() else {
        return skipped("no memfd_secret on this kernel");
    };
    file.set_len(PAGE_SIZE).expect("a size");
    let mapping = Mapping::of_file(&file, 1, PROT_RW, MapFlags::MAP_SHARED);
    assert!(matches!(bench.fault(user(mapping.address(), 1, 0, RW)), FaultReason::Memory(_)));
}

#[test]
fn file_by_descriptor_of_another_kind_or_beyond_its_end_is_invalid() {
    let bench = Bench::new();
    let file = memfd(2 * PAGE_SIZE);
    let beyond = Source::File { file: named(&file, true), offset: PAGE_SIZE };
    let error = bench.map(request(beyond, 2, 0, RW)).expect_err("beyond the end");
    assert_eq!(error.errno(), errno::EINVAL);
    let directory = std::env::current_dir().expect("a directory");
    let other = tempfile::tempfile_in(directory).expect("a file");
    other.set_len(PAGE_SIZE).expect("a size");
    let other = named_as(FileKind::Writeback, &other);
    let error = bench.map(request(Source::File { file: other, offset: 0 }, 1, 0, RW)).expect_err("not shared memory");
    assert_eq!(error.errno(), errno::EINVAL);
    bench.assert_empty();
}

#[test]
fn device_region_is_mapped_uncharged_for_type1_and_refused_for_iommufd() {
    let bench = Bench::new();
    let region = memfd(4 * PAGE_SIZE);
    let mapping = Mapping::of_file(&region, 4, PROT_RW, MapFlags::MAP_SHARED);
    // A front end would know the region's file; here it is shown as one beforehand, to be known by identity.
    let file = named_as(FileKind::DeviceRegion, &region);
    let by_fd = Source::File { file, offset: 0 };
    bench.map(request(by_fd, 1, 0x100000, RW)).expect("a device's own buffer by descriptor");
    let reason = bench.fault(user(mapping.address(), 4, 0, RW));
    assert!(matches!(reason, FaultReason::Unpinnable(_)));
    let type1 = MapRequest { device_regions: true, ..user(mapping.address(), 4, 0, RW) };
    bench.map(type1).expect("mapped");
    bench.both_ways(&mapping, 4, 0);
    assert_eq!((bench.held(), bench.charged()), (4 * PAGE_SIZE, 0));
    bench.ioas.unmap(IovaRange::everything()).expect("unmapped");
    bench.assert_empty();
}

#[test]
fn device_region_by_descriptor_is_not_divided() {
    let bench = Bench::new();
    let region = memfd(2 * PAGE_SIZE);
    let by_fd = Source::File { file: named_as(FileKind::DeviceRegion, &region), offset: 0 };
    bench.map(request(by_fd, 2, 0, RW)).expect("mapped");
    let error = bench.ioas.split(Iova(PAGE_SIZE)).expect_err("divided");
    assert_eq!((error.errno(), bench.ioas.area_count()), (errno::EOPNOTSUPP, 1));
    bench.ioas.split(Iova(0)).expect("a boundary already");
    bench.ioas.unmap(IovaRange::everything()).expect("unmapped");
    bench.assert_empty();
}

#[test]
fn hugetlb_memory_moves_bytes_and_an_empty_pool_is_an_error() {
    let huge = 2u64 << 20;
    let fd = match memfd_create("huge", MFdFlags::MFD_HUGETLB) {
        Ok(fd) => fd,
        Err(error) => return skipped(&format!("no huge pages: {error}")),
    };
    let file = File::from(fd);
    file.set_len(huge).expect("a size");
    let bench = Bench::new();
    // By descriptor nothing is reserved, so with an empty pool the DMA is what fails.
    bench.map(request(Source::File { file: named(&file, true), offset: 0 }, 512, 0, RW)).expect("mapped");
    assert_eq!(bench.store.snapshot().backings[0].kind, "hugetlb");
    match bench.table.dma_write(&bench.store, 0x1234, &[5]) {
        Ok(()) => {
            let mapping = Mapping::of_file(&file, 512, PROT_RW, MapFlags::MAP_SHARED);
            assert_eq!(mapping.byte(0x1234), 5);
        }
        Err(error) => assert!(matches!(error, ioas::StoreError::NoPage(_)), "{error}"),
    }
}

#[test]
fn memory_advised_away_is_had_anew() {
    let bench = Bench::new();
    let mapping = Mapping::anonymous(2, PROT_RW, MapFlags::MAP_SHARED);
    bench.map(user(mapping.address(), 2, 0, RW)).expect("mapped");
    bench.table.dma_write(&bench.store, 0, &[1]).expect("written");
    mapping.forget();
    bench.table.dma_write(&bench.store, 1, &[2]).expect("written");
    assert_eq!((mapping.byte(0), mapping.byte(1)), (0, 2));
}
