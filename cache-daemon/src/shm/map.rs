//! The region as a sealed memfd: made once by the supervisor, mapped by each worker.
//!
//! Why unsafe: the promise of [`Mapping`] that the bytes stay backed. The seals give it: nobody, not even
//! this process, can shrink the file, so no access meets a missing page (SIGBUS).

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kv_protocol::{Mapping, Region, RegionError};
use rustix::fs::{MemfdFlags, SealFlags};

/// Faulted at a time: a worker serves while the rest follows.
pub const EXTENT_BYTES: u64 = 64 << 20;

/// Why there is no region.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// A system call.
    #[error("{what} the region of {bytes} bytes: {source}")]
    Io {
        /// Which.
        what: &'static str,
        /// Of the region.
        bytes: u64,
        /// Why.
        source: std::io::Error,
    },
    /// The pool has not as many.
    #[error(
        "there are no {pages} free huge pages of {page_bytes} bytes: set them aside (vm.nr_hugepages; for a \
         pod, hugepages-2Mi in its limits), or leave out --huge-pages"
    )]
    HugePages {
        /// Needed.
        pages: u64,
        /// Of one.
        page_bytes: u64,
    },
    /// The descriptor could be cut short under us.
    #[error("the region's descriptor is not sealed against shrinking and growing")]
    Unsealed,
    /// Not a region.
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// Pages of the system's pool that the region is made of, where asked: fewer misses of the translation
/// buffer, and a pool that must have been set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum HugePages {
    /// Of 2 MiB.
    #[value(name = "2MiB")]
    Two,
    /// Of 1 GiB.
    #[value(name = "1GiB")]
    Giga,
}

impl HugePages {
    /// Of one.
    pub fn bytes(self) -> u64 {
        match self {
            HugePages::Two => 2 << 20,
            HugePages::Giga => 1 << 30,
        }
    }

    fn flags(self) -> MemfdFlags {
        MemfdFlags::HUGETLB
            | match self {
                HugePages::Two => MemfdFlags::HUGE_2MB,
                HugePages::Giga => MemfdFlags::HUGE_1GB,
            }
    }
}

/// Makes the region: sized, sealed, nothing faulted yet. `bytes` are whole pages of that size.
pub fn create(bytes: u64, huge: Option<HugePages>) -> Result<OwnedFd, MapError> {
    let error = |what, errno: rustix::io::Errno| MapError::Io { what, bytes, source: errno.into() };
    let page_flags = huge.map_or(MemfdFlags::empty(), HugePages::flags);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | page_flags;
    let memfd =
        rustix::fs::memfd_create("colloquy-kv", flags).map_err(|errno| error("creating", errno))?;
    rustix::fs::ftruncate(&memfd, bytes).map_err(|errno| error("sizing", errno))?;
    if let Some(huge) = huge {
        // A mapping reserves all pages, for as long as the file lives. What is missing shows here, in a
        // sentence, and not in a worker that dies again and again.
        let page_bytes = huge.bytes();
        memmap2::MmapOptions::new()
            .map_raw(&memfd)
            .map_err(|_| MapError::HugePages { pages: bytes / page_bytes, page_bytes })?;
    }
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memfd, seals).map_err(|errno| error("sealing", errno))?;
    Ok(memfd)
}

/// Whether a descriptor is a region of `bytes` that nobody can cut short.
pub fn is_region(memfd: &OwnedFd, bytes: u64) -> bool {
    let seals = rustix::fs::fcntl_get_seals(memfd); // Files that are no memfd have none.
    let size = rustix::fs::fstat(memfd).map(|stat| stat.st_size);
    seals.is_ok_and(|seals| seals.contains(SealFlags::SHRINK | SealFlags::GROW))
        && size.is_ok_and(|size| u64::try_from(size) == Ok(bytes))
}

/// Maps the region.
pub fn map(memfd: &OwnedFd) -> Result<Region, MapError> {
    let io = |what, bytes| move |source| MapError::Io { what, bytes, source };
    let seals = rustix::fs::fcntl_get_seals(memfd)
        .map_err(|errno| io("reading the seals of", 0)(errno.into()))?;
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        return Err(MapError::Unsealed);
    }
    let file = File::from(memfd.try_clone().map_err(io("opening", 0))?);
    let bytes = file.metadata().map_err(io("measuring", 0))?.len();
    let map = memmap2::MmapOptions::new().map_raw(&file).map_err(io("mapping", bytes))?;
    Ok(Region::new(Arc::new(SealedMap(map)))?)
}

/// Allocates the pages of one extent, charged to this process's container. A full machine shows here,
/// as an error, and not later as a signal.
pub fn fault_extent(memfd: impl AsFd, offset: u64, bytes: u64) -> std::io::Result<()> {
    Ok(rustix::fs::fallocate(memfd, rustix::fs::FallocateFlags::empty(), offset, bytes)?)
}

struct SealedMap(memmap2::MmapRaw);

// SAFETY: an `MmapRaw` is page aligned, readable, writable, and stays at its address until dropped. Its
// length is the file's, and the file is sealed against shrinking (checked in `map` above), so every
// byte stays backed. The map is private to this type, so nothing else here refers to the bytes.
unsafe impl Mapping for SealedMap {
    fn base(&self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    fn bytes(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 8 << 20;

    #[test]
    fn a_region_cannot_be_cut_short() {
        let memfd = create(BYTES, None).unwrap();
        assert!(rustix::fs::ftruncate(&memfd, 4096).is_err());
        assert!(rustix::fs::ftruncate(&memfd, 2 * BYTES).is_err());
    }

    #[test]
    fn two_maps_see_the_same_bytes() {
        let memfd = create(BYTES, None).unwrap();
        fault_extent(&memfd, 0, BYTES).unwrap();
        let (ours, theirs) = (map(&memfd).unwrap(), map(&memfd).unwrap());
        ours.copy_in(4096, b"colloquy");
        assert_eq!(theirs.read(4096, 8), b"colloquy");
    }

    #[test]
    fn an_unsealed_descriptor_is_refused() {
        let plain = rustix::fs::memfd_create("plain", MemfdFlags::CLOEXEC).unwrap();
        assert!(matches!(map(&plain), Err(MapError::Unsealed)));
    }
}
