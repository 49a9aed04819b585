//! The one namespace: blocks of a host file.
//!
//! Its size is taken when it is opened and stays. A file that is truncated under it, or a host file system that
//! fails, is a media error for the guest and nothing else. Writes go to the host's page cache, which is the volatile
//! write cache that the controller reports; a flush is fdatasync. Deallocated blocks read as zeros: where the host's
//! file system can punch holes they take no space, where it cannot zeros are written.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use super::error::NvmeError;

/// How many bytes of zeros are written at a time where holes cannot be punched.
const ZEROS: usize = 64 << 10;

/// The size of a logical block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BlockSize {
    /// 512 bytes.
    #[default]
    B512,
    /// 4096 bytes.
    B4096,
}

impl BlockSize {
    /// log2 of the size in bytes.
    #[must_use]
    pub const fn shift(self) -> u32 {
        match self {
            Self::B512 => 9,
            Self::B4096 => 12,
        }
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        1 << self.shift()
    }
}

/// A run of blocks inside the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// The first byte in the file.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) length: u64,
}

/// The namespace. See the top of this file.
#[derive(Debug)]
pub(crate) struct Namespace {
    file: File,
    block: BlockSize,
    blocks: u64,
    read_only: bool,
}

impl Namespace {
    /// Opens the backing file.
    pub(crate) fn open(path: &Path, block: BlockSize, read_only: bool) -> Result<Self, NvmeError> {
        let failed = |source| NvmeError::Open { path: path.to_owned(), source };
        let mut file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed)?;
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 || !size.is_multiple_of(u64::from(block.bytes())) {
            return Err(NvmeError::Size { path: path.to_owned(), size, block: block.bytes() });
        }
        Ok(Self { file, block, blocks: size >> block.shift(), read_only })
    }

    pub(crate) fn block(&self) -> BlockSize {
        self.block
    }

    /// Its size in blocks.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Blocks `first` to `first + count - 1`, or `None` when they do not all exist.
    pub(crate) fn range(&self, first: u64, count: u64) -> Option<Blocks> {
        let end = first.checked_add(count).filter(|end| *end <= self.blocks)?;
        Some(Blocks { offset: first << self.block.shift(), length: (end - first) << self.block.shift() })
    }

    /// Reads `data.len()` bytes from byte `offset` on.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, offset)
    }

    /// Writes `data` from byte `offset` on.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Makes what was written durable.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes blocks read as zeros; with `deallocate` they need take no space.
    pub(crate) fn zero(&self, blocks: Blocks, deallocate: bool) -> io::Result<()> {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (punch, zero) = (FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE);
        let modes = if deallocate { [punch | keep, zero | keep] } else { [zero | keep, punch | keep] };
        for mode in modes {
            if let (Ok(offset), Ok(length)) = (blocks.offset.try_into(), blocks.length.try_into())
                && fallocate(&self.file, mode, offset, length).is_ok()
            {
                return Ok(());
            }
        }
        let zeros = vec![0; ZEROS.min(usize::try_from(blocks.length).unwrap_or(ZEROS))];
        let end = blocks.offset + blocks.length;
        for at in (blocks.offset..end).step_by(ZEROS) {
            let length = usize::try_from(end - at).unwrap_or(ZEROS).min(ZEROS);
            self.file.write_all_at(&zeros[..length], at)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), bytes).expect("written");
        file
    }

    #[test]
    fn file_that_is_no_whole_number_of_blocks_is_refused() {
        for (bytes, block) in [(0, BlockSize::B512), (513, BlockSize::B512), (512, BlockSize::B4096)] {
            let error = Namespace::open(file(&vec![0; bytes]).path(), block, false).expect_err("odd");
            assert!(matches!(error, NvmeError::Size { size, .. } if size == bytes as u64));
        }
        let missing = Namespace::open(Path::new("no/such/file"), BlockSize::B512, false);
        assert!(matches!(missing, Err(NvmeError::Open { .. })));
    }

    #[test]
    fn range_past_the_end_or_wrapping_is_none() {
        let file = file(&[0; 4096]);
        let namespace = Namespace::open(file.path(), BlockSize::B512, true).expect("whole");
        assert_eq!(namespace.range(6, 2), Some(Blocks { offset: 3072, length: 1024 }));
        assert_eq!(namespace.range(7, 2), None);
        assert_eq!(namespace.range(u64::MAX, 2), None);
    }

    #[test]
    fn zeroed_blocks_read_as_zeros_and_their_neighbours_stay() {
        let file = file(&[7; 16384]);
        let namespace = Namespace::open(file.path(), BlockSize::B512, false).expect("whole");
        for (deallocate, offset) in [(true, 512), (false, 8192)] {
            namespace.zero(Blocks { offset, length: 1024 }, deallocate).expect("zeroed");
            let mut data = vec![1; 2048];
            namespace.read(offset - 512, &mut data).expect("read");
            assert_eq!((data[511], data[512], data[1535], data[1536]), (7, 0, 0, 7));
        }
        assert_eq!(file.as_file().metadata().expect("exists").len(), 16384);
    }
}
