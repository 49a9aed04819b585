//! Sequences about VFIO's own nodes: two containers, the groups of two devices, and the devices.
//!
//! As in [`crate::generate`] nothing is looked at: what a place is, which group is in which container and what is mapped is
//! believed, so that most requests are about something. The first two places are for containers and the others for the
//! groups, and any file is asked anything now and then.
//!
//! What is left out is what docs/divergences.md names (a new user address is one where there is memory), and what hangs on the
//! device and not on VFIO: BAR 0, which ours has trapped, and the registers. A dirty bitmap is asked for one mapping at a time,
//! from its beginning. And what an older kernel than 7.3 answers otherwise: extension 6, nesting of type1, which 6.12 has; and
//! for 6.12 alone ranges that pass the last address, which are EINVAL there and EOVERFLOW in 7.3.

use conformance::arg;

use crate::play::{ARGUMENT, DATA, HOLE, MEMFD, READ_ONLY, USER};
use crate::random::Random;
use crate::text::{Action, File, Ioctl, PLACES, Step, Vfio, Who, Words};

/// The addresses of the devices.
pub(crate) const DEVICES: [&str; 2] = ["0000:01:00.0", "0000:02:00.0"];

const PAGE: u64 = 0x1000;

/// Extensions, and numbers that are none.
const EXTENSIONS: &[u64] = &[0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 100, 1 << 32 | 1];
/// Kinds of IOMMUs.
const KINDS: &[u64] = &[3, 3, 3, 3, 3, 1, 1, 1, 0, 2, 7, 8, 99];

const IOVAS: &[u64] = &[
    0xfedf_f000,
    0xfee0_0000,
    0xfeef_f000,
    0xfef0_0000,
    (1 << 48) - PAGE,
    1 << 48,
    1 << 63,
    u64::MAX - 0xfff,
    u64::MAX - 1,
    1,
    0x801,
];
const LENGTHS: &[u64] = &[0, 1, 0xfff, 0x1001, 0x20_0000, 1 << 32, 1 << 48, u64::MAX - 0xfff, u64::MAX];

/// A mapping that is believed to be there.
#[derive(Debug, Clone, Copy)]
struct Mapped {
    iova: u64,
    length: u64,
}

/// A container.
#[derive(Debug, Clone, Default)]
struct Container {
    kind: Option<u64>,
    mapped: Vec<Mapped>,
}

struct Native {
    random: Random,
    /// Whether a range may pass the last address.
    wraps: bool,
    containers: [Option<Container>; 2],
    /// Whether the group is open, and the container that it is in.
    groups: [Option<Option<usize>>; 2],
    /// Descriptors of devices: the number and the group.
    devices: Vec<(File, usize)>,
}

/// The sequence of a seed: `length` steps, in which a range may pass the last address if it `wraps`.
pub(crate) fn sequence(seed: u64, length: usize, wraps: bool) -> Vec<Step> {
    let random = Random::new(seed);
    let mut native = Native { random, wraps, containers: Default::default(), groups: [None; 2], devices: Vec::new() };
    (0..length).map(|_| native.step()).collect()
}

fn container(index: usize) -> File {
    File::place(index)
}

fn group(index: usize) -> File {
    File::place(2 + index)
}

fn long(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

impl Native {
    fn step(&mut self) -> Step {
        let mut one = self.random.below(2) as usize;
        // One without a group has little to say.
        if !self.groups.contains(&Some(Some(one))) && self.random.chance(80) {
            one = 1 - one;
        }
        let action = match self.random.below(100) {
            _ if self.containers[one].is_none() && self.random.chance(60) => self.open_container(one),
            _ if self.groups[one].is_none() && self.random.chance(60) => self.open_group(one),
            0 => self.close_something(),
            1 => self.open_container(one),
            2 => self.open_group(one),
            3 => self.anything(),
            4..22 => Action::Ioctl(self.ask_group(one)),
            22..36 => self.ask_device(one),
            _ => Action::Ioctl(self.ask_container(one)),
        };
        // Who maps is who pays; what a child has open goes with it.
        let who = match (&action, self.random.below(40)) {
            (Action::Ioctl(_), 0..2) => Who::Thread,
            (Action::Ioctl(_), 2) => Who::Twin,
            _ => Who::Main,
        };
        Step { who, action }
    }

    fn open_container(&mut self, index: usize) -> Action {
        self.leave(index);
        self.containers[index] = Some(Container::default());
        Action::OpenVfio(container(index), Vfio::Container)
    }

    /// A group that is open is not opened again.
    fn open_group(&mut self, index: usize) -> Action {
        if self.groups[index].is_none() {
            self.groups[index] = Some(None);
        }
        Action::OpenVfio(group(index), Vfio::Group(index))
    }

    /// A container's file has gone; groups keep the container itself.
    fn leave(&mut self, index: usize) {
        for group in self.groups.iter_mut().flatten() {
            if *group == Some(index) {
                *group = None;
            }
        }
    }

    fn close_something(&mut self) -> Action {
        let device = if self.random.chance(50) { self.devices.pop() } else { None };
        let file = match device {
            Some((device, _)) => device,
            None => File::place(self.random.below(PLACES as u64) as usize),
        };
        match file.index() {
            Some(index @ 0..2) => {
                self.leave(index);
                self.containers[index] = None;
            }
            Some(index) => self.groups[index - 2] = None,
            None => {}
        }
        Action::Close(file)
    }

    fn ioctl(&mut self, file: File, request: u32, words: Vec<u32>) -> Ioctl {
        let bytes = words.len() as u64 * 4;
        let address = match self.random.below(150) {
            0 => 0,
            1 => HOLE,
            2 => HOLE - bytes / 8 * 4,
            3 => READ_ONLY,
            _ => ARGUMENT,
        };
        Ioctl { file, request, argument: Words { address, words }, data: None }
    }

    fn number(&self, file: File, request: u32, value: u64) -> Ioctl {
        Ioctl { file, request, argument: Words { address: value, words: Vec::new() }, data: None }
    }

    /// The size of a struct, now and then another.
    fn size(&mut self, size: u32) -> u32 {
        match self.random.below(40) {
            0 => self.random.pick(&[0, 4, size - 1, size - 4]),
            1 => self.random.pick(&[size + 1, size + 8, size + 64, u32::MAX]),
            _ => size,
        }
    }

    /// Any file, asked what another understands.
    fn anything(&mut self) -> Action {
        let all: Vec<File> = (0..PLACES).map(File::place).chain(self.devices.iter().map(|device| device.0)).collect();
        let file = self.random.pick(&all);
        let request = self.random.pick(&[
            arg::VFIO_GET_API_VERSION,
            arg::VFIO_GROUP_GET_STATUS,
            arg::VFIO_GROUP_UNSET_CONTAINER,
            arg::VFIO_IOMMU_UNMAP_DMA,
            arg::IOMMU_IOAS_ALLOC,
            0x3b79,
            0x3b80,
            0x5401,
        ]);
        Action::Ioctl(self.ioctl(file, request, vec![24, 0, 0, 0, 0, 0]))
    }

    fn ask_group(&mut self, index: usize) -> Ioctl {
        let file = group(index);
        let joined = self.groups[index].flatten();
        match self.random.below(10) {
            _ if joined.is_none() && self.random.chance(70) => self.join(index),
            0..2 => {
                let words = vec![self.size(8), 0];
                self.ioctl(file, arg::VFIO_GROUP_GET_STATUS, words)
            }
            2 => self.join(index),
            3 => {
                if !self.devices.iter().any(|device| device.1 == index) && self.groups[index].is_some() {
                    self.groups[index] = Some(None);
                }
                self.number(file, arg::VFIO_GROUP_UNSET_CONTAINER, 0)
            }
            _ if self.devices.len() < 2 || self.random.chance(10) => self.open_device(index),
            _ => {
                let words = vec![8, 0];
                self.ioctl(file, arg::VFIO_GROUP_GET_STATUS, words)
            }
        }
    }

    fn join(&mut self, index: usize) -> Ioctl {
        let into = self.random.below(2) as usize;
        let wrong = self.random.chance(8);
        let number = if wrong { self.random.pick(&[-1, 55, MEMFD, group(index).0]) } else { container(into).0 };
        let ioctl = self.ioctl(group(index), arg::VFIO_GROUP_SET_CONTAINER, vec![number.cast_unsigned()]);
        if !wrong && self.containers[into].is_some() && self.groups[index] == Some(None) {
            self.groups[index] = Some(Some(into));
        }
        ioctl
    }

    fn open_device(&mut self, index: usize) -> Ioctl {
        let name = match self.random.below(12) {
            0 => DEVICES[1 - index],
            1 => self.random.pick(&["", "0000:00:00.0", "0000:01:00.", "nvme", "0000:01:00.0 "]),
            _ => DEVICES[index],
        };
        let bytes: Vec<u8> = name.bytes().chain([0; 4]).collect();
        let words =
            bytes.chunks_exact(4).map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect();
        let ioctl = self.ioctl(group(index), arg::VFIO_GROUP_GET_DEVICE_FD, words);
        let container = self.groups[index].flatten().and_then(|joined| self.containers[joined].as_ref());
        if name == DEVICES[index] && container.is_some_and(|container| container.kind.is_some()) {
            let used: Vec<i32> = self.devices.iter().map(|device| device.0.0).collect();
            let number = (3..).find(|number| !used.contains(number)).unwrap_or_default();
            self.devices.push((File(number), index));
        }
        ioctl
    }

    fn ask_container(&mut self, index: usize) -> Ioctl {
        let file = container(index);
        let joined = self.groups.contains(&Some(Some(index)));
        let ready = self.containers[index].as_ref().is_some_and(|container| container.kind.is_some());
        match self.random.below(100) {
            _ if joined && !ready && self.random.chance(50) => self.set_iommu(index),
            0..3 => {
                let value = self.random.below(3);
                self.number(file, arg::VFIO_GET_API_VERSION, value)
            }
            3..10 => {
                let extension = self.random.pick(EXTENSIONS);
                self.number(file, arg::VFIO_CHECK_EXTENSION, extension)
            }
            10..13 => self.set_iommu(index),
            13..23 => self.get_info(file),
            23..60 => self.map(index),
            60..85 => self.unmap(index),
            _ => self.dirty_pages(index),
        }
    }

    fn set_iommu(&mut self, index: usize) -> Ioctl {
        let kind = self.random.pick(KINDS);
        let joined = self.groups.contains(&Some(Some(index)));
        if let Some(container) = &mut self.containers[index]
            && joined
            && [1, 3].contains(&kind)
            && container.kind.is_none()
        {
            container.kind = Some(kind);
        }
        self.number(container(index), arg::VFIO_SET_IOMMU, kind)
    }

    fn get_info(&mut self, file: File) -> Ioctl {
        let size = self.random.pick(&[16, 20, 24, 24, 80, 0x80, 0x80, 0x100, 15, 0]);
        let mut words = vec![0; 32];
        words[0] = size;
        self.ioctl(file, arg::VFIO_IOMMU_GET_INFO, words)
    }

    /// The mapping that a request is about, mostly one that is there.
    fn about(&mut self, index: usize) -> Option<Mapped> {
        let mapped = self.containers[index].as_ref().map(|container| container.mapped.clone()).unwrap_or_default();
        if mapped.is_empty() || self.random.chance(15) { None } else { Some(self.random.pick(&mapped)) }
    }

    fn iova(&mut self) -> u64 {
        if self.random.chance(6) {
            return self.random.pick(IOVAS);
        }
        // Few places, so that ranges meet.
        let base = self.random.pick(&[0, 0x10_0000, 0x10_0000, 0x4000_0000]);
        base + self.random.below(24) * PAGE
    }

    fn length(&mut self) -> u64 {
        match self.random.below(24) {
            0 => self.random.pick(LENGTHS),
            1 => 0x10_0000,
            _ => (1 + self.random.below(6)) * PAGE,
        }
    }

    fn user(&mut self) -> u64 {
        if self.random.chance(3) {
            return self.random.pick(&[0, 1, USER + 0x18_0000, USER + 0x801, 1 << 47, u64::MAX - 0xfff]);
        }
        let base = self.random.pick(&[0, 0, 0, 0, 0, 0, 0, 0x10_0000, 0x20_0000, 0x20_0000]);
        USER + base + self.random.below(24) * PAGE
    }

    /// As long as it is, or as it may be.
    fn bounded(&self, start: u64, length: u64) -> u64 {
        if !self.wraps && start.checked_add(length).is_none() { 0 } else { length }
    }

    fn map(&mut self, index: usize) -> Ioctl {
        let (mut iova, mut user, mut length) = (self.iova(), self.user(), self.length());
        let mut flags = self.random.pick(&[3, 3, 3, 3, 3, 1, 2, 3, 3, 3, 4, 4, 0, 7, 8]);
        if flags == 4
            && let Some(mapped) = self.about(index)
        {
            (iova, length) = (mapped.iova, mapped.length);
        }
        // A new address is one where there is memory: Linux does not look.
        if flags == 4 {
            user = USER + if length <= 0x8_0000 { user & 0x7_f000 } else { 0 };
        }
        if self.random.chance(1) {
            flags |= 1 << 31;
        }
        length = self.bounded(user, self.bounded(iova, length));
        let size = self.size(32);
        let words = [vec![size, flags], long(user).to_vec(), long(iova).to_vec(), long(length).to_vec()].concat();
        let container_is_ready = self.containers[index].as_mut().filter(|container| container.kind.is_some());
        if let Some(ready) = container_is_ready.filter(|_| (1..=3).contains(&flags) && size >= 32) {
            ready.mapped.push(Mapped { iova, length });
        }
        self.ioctl(container(index), arg::VFIO_IOMMU_MAP_DMA, words)
    }

    fn unmap(&mut self, index: usize) -> Ioctl {
        let about = self.about(index);
        let (mut iova, mut length) = match about {
            Some(mapped) => (mapped.iova, mapped.length),
            None => (self.iova(), self.length()),
        };
        match self.random.below(20) {
            0 => iova = iova.wrapping_add(PAGE),
            1 => length = length.wrapping_add(PAGE),
            2 => length = length.wrapping_sub(PAGE),
            3 => (iova, length) = (iova & !0xf_ffff, 0x20_0000),
            _ => {}
        }
        let flags = self.random.pick(&[0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 2, 6, 1, 3, 8]);
        if flags & 2 != 0 && self.random.chance(80) {
            (iova, length) = (0, 0);
        }
        // With a bitmap of the mapping alone.
        let with_bitmap = about.filter(|_| flags & 1 != 0);
        if let Some(mapped) = with_bitmap {
            (iova, length) = (mapped.iova, mapped.length);
        }
        length = self.bounded(iova, length);
        if flags & 4 == 0
            && let Some(container) = &mut self.containers[index]
        {
            let end = iova.saturating_add(length);
            container.mapped.retain(|mapped| flags & 2 == 0 && (mapped.iova < iova || mapped.iova >= end));
        }
        let size = self.size(24);
        let mut words = [vec![size, flags], long(iova).to_vec(), long(length).to_vec()].concat();
        let data = (flags & 1 != 0).then(|| self.bitmap(&mut words, length));
        Ioctl { data, ..self.ioctl(container(index), arg::VFIO_IOMMU_UNMAP_DMA, words) }
    }

    /// Appends a struct vfio_bitmap for so many bytes of IOVAs, and returns what lies where it points to.
    fn bitmap(&mut self, words: &mut Vec<u32>, length: u64) -> Words {
        let page = self.random.pick(&[PAGE, PAGE, PAGE, PAGE, PAGE, PAGE, 2 * PAGE, 1, 0]);
        let wanted = length.div_ceil(PAGE).div_ceil(64).wrapping_mul(8);
        let size = match self.random.below(12) {
            0 => self.random.pick(&[0, 1, 1 << 28, (1 << 28) + 8, u64::MAX]),
            1 => wanted.wrapping_add(8),
            _ => wanted,
        };
        let address = if self.random.chance(5) { self.random.pick(&[0, HOLE, HOLE - 4, READ_ONLY]) } else { DATA };
        for value in [page, size, address] {
            words.extend(long(value));
        }
        Words { address, words: vec![0; 8] }
    }

    fn dirty_pages(&mut self, index: usize) -> Ioctl {
        let flags = self.random.pick(&[1, 1, 2, 4, 4, 4, 4, 0, 3, 5, 8]);
        let size = self.size(8);
        let mut words = vec![size, flags];
        let mut data = None;
        if flags & 4 != 0 {
            // A range that begins before a mapping, or has several, finds bits of an earlier one: see docs/divergences.md.
            let mapped = self.about(index).unwrap_or(Mapped { iova: 0x7000_0000, length: PAGE });
            let length = if self.random.chance(5) { self.random.pick(&[0, 1, 0x801]) } else { mapped.length };
            words[0] = self.size(48);
            words.extend(long(mapped.iova));
            words.extend(long(length));
            data = Some(self.bitmap(&mut words, length));
        }
        Ioctl { data, ..self.ioctl(container(index), arg::VFIO_IOMMU_DIRTY_PAGES, words) }
    }

    fn ask_device(&mut self, index: usize) -> Action {
        if self.devices.is_empty() {
            return Action::Ioctl(self.ask_group(index));
        }
        let (file, _) = self.random.pick(&self.devices);
        Action::Ioctl(match self.random.below(20) {
            0..3 => {
                let words = vec![self.size(20), 0, 0, 0, 0, 0];
                self.ioctl(file, arg::VFIO_DEVICE_GET_INFO, words)
            }
            3..8 => {
                let region = self.random.pick(&[1, 2, 5, 6, 7, 7, 8, 9, 10, u32::MAX]);
                let words = vec![self.size(32), 0, region, 0, 0, 0, 0, 0];
                self.ioctl(file, arg::VFIO_DEVICE_GET_REGION_INFO, words)
            }
            8..12 => {
                let line = self.random.pick(&[0, 1, 2, 3, 4, 5, u32::MAX]);
                let words = vec![self.size(16), 0, line, 0];
                self.ioctl(file, arg::VFIO_DEVICE_GET_IRQ_INFO, words)
            }
            12..19 => self.set_irqs(file),
            _ => self.number(file, arg::VFIO_DEVICE_RESET, 0),
        })
    }

    /// Without an eventfd: what there is to signal stays unheard.
    fn set_irqs(&mut self, file: File) -> Ioctl {
        let flags =
            self.random.pick(&[0x24, 0x24, 0x24, 0x24, 0x21, 0x22, 0x09, 0x11, 0x0c, 0x14, 0, 0x25, 0x38, 0x64]);
        let line = self.random.pick(&[2, 2, 2, 2, 0, 0, 1, 3, 4, 5]);
        let start = self.random.pick(&[0, 0, 0, 0, 1, 2, 64, 65, u32::MAX]);
        let count = self.random.pick(&[0, 0, 1, 1, 2, 3, 65, 66, u32::MAX]);
        let size = self.random.pick(&[20, 24, 28, 32, 32, 32, 16, 19, 284]);
        let number = self.random.pick(&[-1, -1, -1, MEMFD, 55]);
        let mut words = vec![size, flags, line, start, count];
        let numbers = if size > 32 { 66 } else { 3 };
        words.resize(5 + numbers, number.cast_unsigned());
        self.ioctl(file, arg::VFIO_DEVICE_SET_IRQS, words)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use conformance::arg;

    use super::sequence;
    use crate::text::{Action, Step, parse};

    #[test]
    fn sequence_of_a_seed_is_the_same_and_survives_being_written() {
        let steps = sequence(3, 200, true);
        assert_eq!(sequence(3, 200, true), steps);
        assert_ne!(sequence(4, 200, true), steps);
        let text: String = steps.iter().map(|step| format!("{step}\n")).collect();
        assert_eq!(parse(&text).expect("own text"), steps);
    }

    #[test]
    fn no_range_passes_the_last_address_where_none_may() {
        for step in (1..200).flat_map(|seed| sequence(seed, 200, false)) {
            let Action::Ioctl(ioctl) = step.action else { continue };
            let words = ioctl.argument.words;
            let long = |at: usize| u64::from(words[at + 1]) << 32 | u64::from(words[at]);
            let ranges = match ioctl.request {
                arg::VFIO_IOMMU_MAP_DMA => vec![(long(2), long(6)), (long(4), long(6))],
                arg::VFIO_IOMMU_UNMAP_DMA => vec![(long(2), long(4))],
                _ => continue,
            };
            assert!(ranges.iter().all(|(start, length)| start.checked_add(*length).is_some()), "{words:x?}");
        }
    }

    #[test]
    fn everything_is_asked() {
        let steps: Vec<Step> = (1..100).flat_map(|seed| sequence(seed, 200, true)).collect();
        let request = |step: &Step| match &step.action {
            Action::Ioctl(ioctl) => Some(ioctl.request),
            _ => None,
        };
        let asked: BTreeSet<u32> = steps.iter().filter_map(request).collect();
        assert!((0x3b64..=0x3b6f).chain(0x3b70..=0x3b72).chain([0x3b75]).all(|number| asked.contains(&number)));
    }
}
