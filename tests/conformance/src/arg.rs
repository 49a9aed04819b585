//! Ioctl numbers and argument bytes, written down by hand from Linux 7.3's headers (include/uapi/linux/vfio.h and
//! iommufd.h). A row composes its argument word by word, so that it can be wrong in any way it likes, and so that
//! no definition of the code under test is trusted.

/// A VFIO or iommufd ioctl: type `;`, size 0, no direction.
const fn number(nr: u32) -> u32 {
    (b';' as u32) << 8 | nr
}

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident = $nr:literal;)*) => {
        $(#[doc = concat!("Request number ", stringify!($nr), ".")] $(#[$doc])* pub const $name: u32 = number($nr);)*
    };
}

numbers! {
    VFIO_GET_API_VERSION = 100;
    VFIO_CHECK_EXTENSION = 101;
    VFIO_SET_IOMMU = 102;
    VFIO_GROUP_GET_STATUS = 103;
    VFIO_GROUP_SET_CONTAINER = 104;
    VFIO_GROUP_UNSET_CONTAINER = 105;
    VFIO_GROUP_GET_DEVICE_FD = 106;
    VFIO_DEVICE_GET_INFO = 107;
    VFIO_DEVICE_GET_REGION_INFO = 108;
    VFIO_DEVICE_GET_IRQ_INFO = 109;
    VFIO_DEVICE_SET_IRQS = 110;
    VFIO_DEVICE_RESET = 111;
    VFIO_DEVICE_PCI_HOT_RESET_INFO = 112;
    VFIO_DEVICE_PCI_HOT_RESET = 113;
    VFIO_DEVICE_FEATURE = 117;
    VFIO_DEVICE_BIND_IOMMUFD = 118;
    VFIO_DEVICE_ATTACH_IOMMUFD_PT = 119;
    VFIO_DEVICE_DETACH_IOMMUFD_PT = 120;
    VFIO_IOMMU_GET_INFO = 112;
    VFIO_IOMMU_MAP_DMA = 113;
    VFIO_IOMMU_UNMAP_DMA = 114;
    VFIO_IOMMU_DIRTY_PAGES = 117;
    IOMMU_DESTROY = 0x80;
    IOMMU_IOAS_ALLOC = 0x81;
    IOMMU_IOAS_ALLOW_IOVAS = 0x82;
    IOMMU_IOAS_COPY = 0x83;
    IOMMU_IOAS_IOVA_RANGES = 0x84;
    IOMMU_IOAS_MAP = 0x85;
    IOMMU_IOAS_UNMAP = 0x86;
    IOMMU_OPTION = 0x87;
    IOMMU_VFIO_IOAS = 0x88;
    IOMMU_HWPT_ALLOC = 0x89;
    IOMMU_GET_HW_INFO = 0x8a;
    IOMMU_IOAS_MAP_FILE = 0x8f;
}

/// The bytes that an ioctl's argument points to, aligned as its struct is.
#[derive(Debug, Clone, Default)]
pub struct Arg {
    words: Vec<u64>,
    length: usize,
}

impl Arg {
    /// No bytes yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// `length` bytes, all `byte`.
    #[must_use]
    pub fn filled(length: usize, byte: u8) -> Self {
        let mut arg = Self::new();
        for _ in 0..length {
            arg.push(&[byte]);
        }
        arg
    }

    /// Appends a 32-bit field.
    #[must_use]
    pub fn u32(mut self, value: u32) -> Self {
        self.push(&value.to_le_bytes());
        self
    }

    /// Appends a 64-bit field.
    #[must_use]
    pub fn u64(mut self, value: u64) -> Self {
        self.push(&value.to_le_bytes());
        self
    }

    /// All bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let bytes = self.words.iter().flat_map(|word| word.to_le_bytes());
        bytes.take(self.length).collect()
    }

    /// Appends bytes.
    #[must_use]
    pub fn bytes(mut self, value: &[u8]) -> Self {
        self.push(value);
        self
    }

    /// Appends zeros up to `length` bytes.
    #[must_use]
    pub fn room(mut self, length: usize) -> Self {
        while self.length < length {
            self.push(&[0]);
        }
        self
    }

    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let (word, shift) = (self.length / 8, self.length % 8 * 8);
            if word == self.words.len() {
                self.words.push(0);
            }
            self.words[word] |= u64::from(*byte) << shift;
            self.length += 1;
        }
    }

    /// Overwrites the 32-bit field at a byte offset.
    pub fn set_u32(&mut self, offset: usize, value: u32) {
        let (word, shift) = (offset / 8, offset % 8 * 8);
        self.words[word] = self.words[word] & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    /// Its address, for the kernel.
    #[must_use]
    pub fn address(&mut self) -> u64 {
        self.words.as_mut_ptr().expose_provenance() as u64
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The 32-bit field at a byte offset, a multiple of 4.
    #[must_use]
    pub fn get_u32(&self, offset: usize) -> u32 {
        (self.words[offset / 8] >> (offset % 8 * 8)) as u32
    }

    /// The 64-bit field at a byte offset, a multiple of 8.
    #[must_use]
    pub fn get_u64(&self, offset: usize) -> u64 {
        self.words[offset / 8]
    }
}
