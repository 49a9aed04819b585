//! The IOAS beside a model that knows every page by itself: random changes, and both must agree on every answer,
//! every area, every leaf and every byte held and charged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ioas::table::PageTable;
use ioas::{
    Access, AreaMemory, Ioas, IoasError, Iova, IovaChoice, IovaRange, PAGE_SIZE, ReservationOwner, Source, UserAddr,
    errno,
};
use nix::sys::mman::MapFlags;
use proptest::prelude::*;

use crate::kinds::{Bench, PROT_RW, RW, request};
use crate::process::{memfd, named};
use crate::sys::Mapping;
use crate::table::{MapTable, range};

/// The IOVAs that random requests name, in pages.
const PAGES: u64 = 64;
/// Pages of each kind of memory.
const MEMORY: u64 = 8;

#[derive(Debug, Clone)]
enum Change {
    Map { memory: Memory, first: u64, pages: u64, iova: Option<u64>, access: Access },
    Unmap { iova: u64, pages: u64 },
    UnmapAll,
    UnmapInside { iova: u64, pages: u64 },
    Copy { iova: u64, pages: u64, to: Option<u64>, access: Access },
    Split { iova: u64 },
    Reserve { owner: usize, iova: u64, pages: u64 },
    Unreserve { owner: usize },
    Allow { ranges: Vec<(u64, u64)> },
    AddTable { table: usize },
    RemoveTable { table: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Memory {
    Private,
    SharedByAddress,
    SharedByDescriptor,
}

/// A page, however it is reached.
type Identity = (bool, u64);

impl Memory {
    fn identity(self, page: u64) -> Identity {
        (self == Self::Private, page)
    }
}

fn change() -> impl Strategy<Value = Change> {
    let memory = prop::sample::select(vec![Memory::Private, Memory::SharedByAddress, Memory::SharedByDescriptor]);
    let access = prop::sample::select(vec![RW, RW, Access::READ]);
    let iova = || prop_oneof![3 => (0..PAGES).prop_map(Some), 1 => Just(None)];
    let span = (0..PAGES, 1u64..12);
    prop_oneof![
        8 => (memory, 0..MEMORY, 1..=MEMORY, iova(), access.clone()).prop_map(|(memory, first, pages, iova, access)| {
            Change::Map { memory, first, pages: pages.min(MEMORY - first), iova, access }
        }),
        4 => span.clone().prop_map(|(iova, pages)| Change::Unmap { iova, pages }),
        1 => Just(Change::UnmapAll),
        2 => span.clone().prop_map(|(iova, pages)| Change::UnmapInside { iova, pages }),
        4 => (span.clone(), iova(), access).prop_map(|((iova, pages), to, access)| {
            Change::Copy { iova, pages: pages.min(4), to, access }
        }),
        3 => (0..PAGES).prop_map(|iova| Change::Split { iova }),
        1 => (0..2usize, span).prop_map(|(owner, (iova, pages))| Change::Reserve { owner, iova, pages }),
        1 => (0..2usize).prop_map(|owner| Change::Unreserve { owner }),
        1 => prop::collection::vec((0..PAGES, 1u64..32), 0..3).prop_map(|ranges| Change::Allow { ranges }),
        2 => (0..2usize).prop_map(|table| Change::AddTable { table }),
        2 => (0..2usize).prop_map(|table| Change::RemoveTable { table }),
    ]
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct ModelArea {
    pages: u64,
    memory: Memory,
    /// Page of the memory.
    first: u64,
    access: Access,
    writable: bool,
}

/// All numbers in pages.
#[derive(Debug, Default)]
struct Model {
    areas: BTreeMap<u64, ModelArea>,
    reserved: Vec<(usize, u64, u64)>,
    allowed: Vec<(u64, u64)>,
    tables: BTreeSet<usize>,
}

impl Model {
    fn used(&self, page: u64) -> bool {
        self.areas.iter().any(|(start, area)| (*start..start + area.pages).contains(&page))
    }

    fn reserved(&self, page: u64) -> bool {
        self.reserved.iter().any(|(_, start, pages)| (*start..start + pages).contains(&page))
    }

    fn allowed(&self, page: u64) -> bool {
        self.allowed.is_empty() || self.allowed.iter().any(|(start, pages)| (*start..start + pages).contains(&page))
    }

    /// Linux's automatic IOVA for memory at byte `address`.
    fn choose(&self, address: u64, pages: u64) -> Result<u64, i32> {
        let natural = (pages * PAGE_SIZE).next_power_of_two();
        let kept = if address == 0 { natural } else { natural.min(1 << address.trailing_zeros()) };
        let step = (kept / PAGE_SIZE).max(1);
        let fits = |at: u64| {
            // A hole of a single byte more than needed is refused by Linux's `start >= last`; pages are larger.
            (at..at + pages).all(|page| !self.used(page) && !self.reserved(page) && self.allowed(page))
        };
        (1..PAGES * 8).filter(|at| at % step == 0).find(|at| fits(*at)).ok_or(errno::ENOSPC)
    }

    fn map(&mut self, pieces: Vec<ModelArea>, address: u64, iova: Option<u64>) -> Result<u64, i32> {
        let pages: u64 = pieces.iter().map(|piece| piece.pages).sum();
        let start = match iova {
            None => self.choose(address, pages)?,
            Some(start) if (start..start + pages).any(|page| self.reserved(page)) => return Err(errno::EINVAL),
            Some(start) if (start..start + pages).any(|page| self.used(page)) => return Err(errno::EEXIST),
            Some(start) => start,
        };
        if pieces.iter().any(|piece| piece.access.contains(Access::WRITE) && !piece.writable) {
            return Err(errno::EPERM);
        }
        let mut at = start;
        for piece in pieces {
            at += piece.pages;
            self.areas.insert(at - piece.pages, piece);
        }
        Ok(start)
    }

    fn unmap(&mut self, iova: u64, pages: u64) -> Result<u64, i32> {
        let mut gone = 0;
        for (start, area) in self.areas.clone() {
            if start + area.pages <= iova || start >= iova + pages {
                continue;
            }
            if start < iova || start + area.pages > iova + pages {
                return Err(errno::ENOENT);
            }
            self.areas.remove(&start);
            gone += area.pages;
        }
        if gone == 0 { Err(errno::ENOENT) } else { Ok(gone) }
    }

    fn unmap_inside(&mut self, iova: u64, pages: u64) -> u64 {
        let inside = |start: u64, area: &ModelArea| start >= iova && start + area.pages <= iova + pages;
        let gone = self.areas.iter().filter(|(start, area)| inside(**start, area)).map(|(_, area)| area.pages).sum();
        self.areas.retain(|start, area| !inside(*start, area));
        gone
    }

    fn pieces(&self, iova: u64, pages: u64) -> Option<Vec<ModelArea>> {
        let mut pieces: Vec<ModelArea> = Vec::new();
        let mut last_start = None;
        for page in iova..iova + pages {
            let (start, area) = self.areas.range(..=page).next_back()?;
            if page >= start + area.pages {
                return None;
            }
            match pieces.last_mut() {
                Some(piece) if last_start == Some(*start) => piece.pages += 1,
                _ => pieces.push(ModelArea { pages: 1, first: area.first + (page - start), ..area.clone() }),
            }
            last_start = Some(*start);
        }
        Some(pieces)
    }

    fn split(&mut self, at: u64) {
        let Some((&start, area)) = self.areas.range_mut(..at).next_back() else { return };
        if start + area.pages > at {
            let left = at - start;
            let right = ModelArea { pages: area.pages - left, first: area.first + left, ..area.clone() };
            area.pages = left;
            self.areas.insert(at, right);
        }
    }

    /// What every leaf should be: IOVA page, to memory and access.
    fn leaves(&self) -> BTreeMap<u64, (Identity, Access)> {
        let of_area = |(start, area): (&u64, &ModelArea)| {
            let (start, area) = (*start, area.clone());
            (0..area.pages).map(move |page| (start + page, (area.memory.identity(area.first + page), area.access)))
        };
        self.areas.iter().flat_map(of_area).collect()
    }
}

struct Run {
    bench: Bench,
    tables: [Arc<MapTable>; 2],
    owners: [ReservationOwner; 2],
    private: Mapping,
    file: std::fs::File,
    shared: Mapping,
    model: Model,
}

impl Run {
    fn new() -> Self {
        let file = memfd(MEMORY * PAGE_SIZE);
        Self {
            bench: Bench::without_table(),
            tables: [
                MapTable::with(PAGE_SIZE, vec![IovaRange::everything()]),
                MapTable::with(PAGE_SIZE, vec![IovaRange::everything()]),
            ],
            owners: [ReservationOwner::unique(), ReservationOwner::unique()],
            private: Mapping::private(MEMORY),
            shared: Mapping::of_file(&file, MEMORY, PROT_RW, MapFlags::MAP_SHARED),
            file,
            model: Model::default(),
        }
    }

    fn ioas(&self) -> &Ioas {
        &self.bench.ioas
    }

    fn address(&self, memory: Memory, page: u64) -> u64 {
        page * PAGE_SIZE
            + match memory {
                Memory::Private => self.private.address(),
                Memory::SharedByAddress => self.shared.address(),
                Memory::SharedByDescriptor => 0,
            }
    }

    /// Applies one change to both, and compares the answers.
    fn apply(&mut self, change: &Change) -> Result<(), TestCaseError> {
        let bytes =
            |answer: Result<u64, IoasError>| answer.map(|bytes| bytes / PAGE_SIZE).map_err(|error| error.errno());
        let place = |answer: Result<IovaRange, IoasError>| bytes(answer.map(|range| range.start().0));
        let choice =
            |iova: Option<u64>| iova.map_or(IovaChoice::Auto, |page| IovaChoice::Fixed(Iova(page * PAGE_SIZE)));
        let span = |iova: u64, pages: u64| range(iova * PAGE_SIZE, pages * PAGE_SIZE);
        let nothing = |answer: Result<(), IoasError>| bytes(answer.map(|()| 0));
        let (ours, models) = match change.clone() {
            Change::Map { memory, first, pages, iova, access } => {
                let address = self.address(memory, first);
                let source = match memory {
                    Memory::SharedByDescriptor => Source::File { file: named(&self.file, true), offset: address },
                    _ => Source::User(UserAddr(address)),
                };
                let request = ioas::MapRequest { iova: choice(iova), ..request(source, pages, 0, access) };
                let area = ModelArea { pages, memory, first, access, writable: access.contains(Access::WRITE) };
                (place(self.bench.map(request)), self.model.map(vec![area], address, iova))
            }
            Change::Unmap { iova, pages } => {
                (bytes(self.ioas().unmap(span(iova, pages))), self.model.unmap(iova, pages))
            }
            Change::UnmapAll => {
                let all = self.model.areas.values().map(|area| area.pages).sum();
                self.model.areas.clear();
                (bytes(self.ioas().unmap(IovaRange::everything())), Ok(all))
            }
            Change::UnmapInside { iova, pages } => {
                let gone = self.model.unmap_inside(iova, pages);
                (Ok(self.ioas().unmap_areas(span(iova, pages)) / PAGE_SIZE), Ok(gone))
            }
            Change::Copy { iova, pages, to, access } => {
                let answer = self.ioas().copy_from(self.ioas(), span(iova, pages), choice(to), access);
                let model = match self.model.pieces(iova, pages) {
                    None => Err(errno::ENOENT),
                    Some(mut pieces) => {
                        let address = self.address(pieces[0].memory, pieces[0].first);
                        pieces.iter_mut().for_each(|piece| piece.access = access);
                        self.model.map(pieces, address, to)
                    }
                };
                (place(answer), model)
            }
            Change::Split { iova } => {
                self.model.split(iova);
                (nothing(self.ioas().split(Iova(iova * PAGE_SIZE))), Ok(0))
            }
            Change::Reserve { owner, iova, pages } => {
                let free = (iova..iova + pages)
                    .all(|page| !self.model.used(page) && (self.model.allowed.is_empty() || !self.model.allowed(page)));
                if free {
                    self.model.reserved.push((owner, iova, pages));
                }
                let answer = nothing(self.ioas().reserve(self.owners[owner], &[span(iova, pages)]));
                (answer, if free { Ok(0) } else { Err(errno::EADDRINUSE) })
            }
            Change::Unreserve { owner } => {
                self.model.reserved.retain(|(by, ..)| *by != owner);
                self.ioas().unreserve(self.owners[owner]);
                (Ok(0), Ok(0))
            }
            Change::Allow { ranges } => {
                let overlap = |(a, b): (&(u64, u64), &(u64, u64))| a.0 < b.0 + b.1 && b.0 < a.0 + a.1;
                let overlapping = ranges.len() == 2 && overlap((&ranges[0], &ranges[1]));
                let taken =
                    ranges.iter().any(|(start, pages)| (*start..start + pages).any(|page| self.model.reserved(page)));
                let spans: Vec<_> = ranges.iter().map(|(start, pages)| span(*start, *pages)).collect();
                let answer = nothing(self.ioas().allow_iovas(&spans));
                let model = match (overlapping, taken) {
                    (true, _) => Err(errno::EINVAL),
                    (_, true) => Err(errno::EADDRINUSE),
                    _ => Ok(0),
                };
                if model.is_ok() {
                    self.model.allowed = ranges;
                }
                (answer, model)
            }
            Change::AddTable { table } => {
                if !self.model.tables.insert(table) {
                    return Ok(());
                }
                (nothing(self.ioas().add_table(self.tables[table].clone())), Ok(0))
            }
            Change::RemoveTable { table } => {
                self.model.tables.remove(&table);
                self.ioas().remove_table(&(self.tables[table].clone() as Arc<dyn PageTable>));
                (Ok(0), Ok(0))
            }
        };
        prop_assert_eq!(ours, models, "{:?}", change);
        Ok(())
    }

    /// Compares all that can be seen.
    fn compare(&self) -> Result<(), TestCaseError> {
        let views = self.ioas().areas_in(IovaRange::everything());
        prop_assert_eq!(views.len(), self.model.areas.len());
        for (view, (start, area)) in views.iter().zip(&self.model.areas) {
            prop_assert_eq!(view.range, range(start * PAGE_SIZE, area.pages * PAGE_SIZE));
            prop_assert_eq!(view.access, area.access);
            let (AreaMemory::User(UserAddr(address)) | AreaMemory::File { offset: address, .. }) = view.memory;
            prop_assert_eq!(address, self.address(area.memory, area.first));
        }
        let leaves = self.model.leaves();
        let mut frames = BTreeMap::new();
        for (number, table) in self.tables.iter().enumerate() {
            let ours = table.leaves();
            prop_assert_eq!(ours.len(), if self.model.tables.contains(&number) { leaves.len() } else { 0 });
            for (iova, (frame, offset, access)) in ours {
                let (identity, expected) = leaves[&(iova / PAGE_SIZE)];
                prop_assert_eq!((offset, access), (0, expected));
                let known = *frames.entry(identity).or_insert(frame);
                prop_assert_eq!(known, frame, "one page has one frame");
            }
        }
        let distinct: BTreeSet<_> = frames.values().collect();
        prop_assert_eq!(distinct.len(), frames.len(), "two pages have two frames");
        prop_assert_eq!(self.bench.held(), frames.len() as u64 * PAGE_SIZE);
        prop_assert_eq!(self.bench.charged(), frames.len() as u64 * PAGE_SIZE);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn ioas_after_random_changes_agrees_with_a_page_model(changes in prop::collection::vec(change(), 1..60)) {
        let mut run = Run::new();
        for change in &changes {
            run.apply(change)?;
            run.compare()?;
        }
        run.ioas().unmap(IovaRange::everything()).expect("unmapped");
        run.bench.assert_empty();
    }
}
