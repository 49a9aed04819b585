//! What memory may be held: asks the client what is at an address, and applies Linux's rules of pinning.
//!
//! Shared mappings become pages of their file, everything else becomes private memory of the memory map. A private
//! mapping of a file is copy-on-write: it is reached as private memory, never through the file. Where the front end
//! may not open a shared mapping's file, its memory is reached as private memory too; and so are bytes that are only to
//! be copied, where the mapping itself says that its pages can be held, because to open and to map a file for them would
//! take many times as long.
//!
//! Called with no lock that another client waits for. Source: mm/gup.c (check_vma_flags, writable_file_mapping_allowed),
//! mm/memfd.c (memfd_pin_folios).

use std::sync::Arc;

use crate::addr::{PAGE_SHIFT, PAGE_SIZE, UserAddr};
use crate::backing::{Backing, BackingRef, FileBacking};
use crate::caller::{FileKind, MemoryError, MemoryMap, Vma};
use crate::error::{FaultReason, IoasError};
use crate::failpoint;
use crate::several::Several;
use crate::store::{PageStore, Wanted};

/// What the pages were mapped for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rights {
    pub(crate) writable: bool,
    /// Regions of devices may be held.
    pub(crate) device_regions: bool,
}

/// What the pages are needed for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// They are held, for as long as somebody wants.
    Hold,
    /// Bytes of them are copied, and then they are let go.
    Copy,
}

/// Pages of one backing that were found behind addresses of a client.
pub(crate) struct Found {
    backing: Backing,
    index: u64,
    pages: u64,
    charged: bool,
}

impl Found {
    /// What is to be held of it: all.
    pub(crate) const fn wanted(&self) -> Wanted<'_> {
        let &Self { ref backing, index, pages, charged } = self;
        Wanted { backing: backing.as_ref(), index, pages, charged }
    }
}

/// What `pages` pages of a memory map from the page at `address` on are, if they may be held.
pub(crate) fn user_memory(
    store: &PageStore,
    memory: &Arc<dyn MemoryMap>,
    address: UserAddr,
    pages: u64,
    (rights, need): (Rights, Need),
) -> Result<Several<Found>, IoasError> {
    let mut all = Several::new();
    let (mut at, end) = (address.0 >> PAGE_SHIFT, (address.0 >> PAGE_SHIFT) + pages);
    while at < end {
        let address = UserAddr(at << PAGE_SHIFT);
        let fault = |reason| IoasError::Fault { address, reason };
        if failpoint::reached("resolve.vma") {
            return Err(fault(FaultReason::Injected));
        }
        let vma = memory.vma(address).map_err(|error| fault(error.into()))?;
        if rights.writable && !vma.writable {
            return Err(fault(FaultReason::NotWritable));
        }
        if !rights.writable && !vma.readable {
            return Err(fault(FaultReason::NotReadable));
        }
        let stop = end.min((vma.range.last().0 >> PAGE_SHIFT) + 1);
        let file = shared_file(store, &**memory, &vma, (rights, need)).map_err(|error| fault(error.into()))?;
        let found = match file {
            Some((file, offset)) => {
                check_kind(&file, rights).map_err(fault)?;
                let index = (offset + (address.0 - vma.range.start().0)) >> PAGE_SHIFT;
                check_size(&file, index + (stop - at)).map_err(fault)?;
                let charged = file.kind != FileKind::DeviceRegion;
                Found { backing: Backing::File(file), index, pages: stop - at, charged }
            }
            None => {
                check_private_size(&**memory, &vma, address, stop - at).map_err(fault)?;
                Found { backing: Backing::Private(Arc::clone(memory)), index: at, pages: stop - at, charged: true }
            }
        };
        all.push(found);
        at = stop;
    }
    Ok(all)
}

/// The file behind a shared mapping and the offset of the mapping's start in it; `None` where its memory is reached as
/// private memory.
fn shared_file(
    store: &PageStore,
    memory: &dyn MemoryMap,
    vma: &Vma,
    (rights, need): (Rights, Need),
) -> Result<Option<(Arc<FileBacking>, u64)>, MemoryError> {
    let Some((id, offset)) = vma.file.filter(|_| vma.shared) else { return Ok(None) };
    if let Some(known) = store.known_file(id, rights.writable) {
        return Ok(Some((known, offset)));
    }
    if need == Need::Copy && vma.shmem {
        return Ok(None);
    }
    match memory.open_file(vma) {
        Ok(file) => Ok(Some((store.adopt_file(file.into()), offset))),
        Err(MemoryError::Denied) => Ok(None),
        Err(error) => Err(error),
    }
}

fn check_kind(file: &FileBacking, rights: Rights) -> Result<(), FaultReason> {
    match file.kind {
        FileKind::Shmem | FileKind::Hugetlb(_) => Ok(()),
        FileKind::DeviceRegion if rights.device_regions => Ok(()),
        FileKind::Writeback if rights.writable => Err(FaultReason::Writeback(file.id)),
        FileKind::Writeback => Ok(()),
        FileKind::DeviceRegion | FileKind::Unpinnable => Err(FaultReason::Unpinnable(file.kind)),
    }
}

/// A page past the end of the file raises SIGBUS in the client, so there is nothing to hold.
fn check_size(file: &FileBacking, end_page: u64) -> Result<(), FaultReason> {
    let size = file.size();
    if end_page > size.div_ceil(PAGE_SIZE) { Err(FaultReason::BeyondEnd { file: file.id, size }) } else { Ok(()) }
}

/// As [`check_size`], for `pages` pages from `address` on of a mapping that copies a file on write: what has been copied
/// goes when the file is cut too.
fn check_private_size(memory: &dyn MemoryMap, vma: &Vma, address: UserAddr, pages: u64) -> Result<(), FaultReason> {
    let Some((file, offset)) = vma.file.filter(|_| !vma.shared) else { return Ok(()) };
    let Some(size) = memory.private_file_size(vma) else { return Ok(()) };
    let first = (offset + (address.0 - vma.range.start().0)) >> PAGE_SHIFT;
    if first + pages > size.div_ceil(PAGE_SIZE) { Err(FaultReason::BeyondEnd { file, size }) } else { Ok(()) }
}

/// The region of a device does not grow: what is not in it when it is mapped never will be. It may be taken away later,
/// which is found by DMA only.
pub(crate) fn check_region(file: &FileBacking, offset: u64, length: u64) -> Result<(), IoasError> {
    if file.kind != FileKind::DeviceRegion {
        return Ok(());
    }
    let size = file.seen_size();
    let inside = offset.checked_add(length).is_some_and(|end| end <= size);
    if inside { Ok(()) } else { Err(IoasError::BadFile { file: file.id, kind: file.kind, size, offset }) }
}

/// `pages` pages of a file of `size` bytes that was named by descriptor, from byte `offset` on, if they may be held.
#[inline(always)]
pub(crate) fn file_memory(
    file: &Arc<FileBacking>,
    size: u64,
    offset: u64,
    pages: u64,
    rights: Rights,
) -> Result<Wanted<'_>, IoasError> {
    let address = UserAddr(offset);
    if failpoint::reached("resolve.file") {
        return Err(IoasError::Fault { address, reason: FaultReason::Injected });
    }
    let end = pages.checked_mul(PAGE_SIZE).and_then(|bytes| offset.checked_add(bytes));
    let is_region = file.kind == FileKind::DeviceRegion;
    let kind_fits = is_region || matches!(file.kind, FileKind::Shmem | FileKind::Hugetlb(_));
    let inside = is_region || end.is_some_and(|end| end <= size);
    if !kind_fits || !inside {
        let offset = if kind_fits { size & !(PAGE_SIZE - 1) } else { offset };
        return Err(IoasError::BadFile { file: file.id, kind: file.kind, size, offset });
    }
    // After the kind of file: Linux looks at no descriptor's rights here.
    if rights.writable && !file.writable() {
        return Err(IoasError::Fault { address, reason: FaultReason::NotWritable });
    }
    let charged = !is_region;
    Ok(Wanted { backing: BackingRef::File(file), index: offset >> PAGE_SHIFT, pages, charged })
}
