//! The seam under slot files: everything that can fail on a drive goes through it, so that tests can
//! make it fail.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kv_protocol::Span;
use rustix::fs::{FallocateFlags, OFlags};

use super::format::PAGE_BYTES;
use super::home::aside;
use super::pages::Pages;
use crate::shm::direct::Parts;

/// Slot files are `slots-<number>`.
const PREFIX: &str = "slots-";

/// Overwritten with zeros at once, where the file system cannot punch holes.
const OVERWRITTEN_PAGES: usize = 256;

/// A file of slots. Offsets, lengths and addresses are multiples of [`PAGE_BYTES`], but for a payload's
/// length.
pub trait SlotFile: Send + Sync {
    /// Fills `to`, or fails.
    fn read(&self, to: &mut [u8], at: u64) -> io::Result<()>;
    /// Writes all of `from`, or fails and may have written some.
    fn write(&self, from: &[u8], at: u64) -> io::Result<()>;
    /// Fills header page and payload of the slot at `at`, or fails. This one copies.
    fn read_slot(&self, page: &mut [u8], payload: &Span, at: u64) -> io::Result<()> {
        let mut slot = Pages::new(1 + payload_pages(payload));
        self.read(&mut slot, at)?;
        page.copy_from_slice(&slot[..PAGE_BYTES]);
        payload.copy_in(0, &slot[PAGE_BYTES..][..payload.bytes() as usize]);
        Ok(())
    }
    /// Writes header page and payload, with zeros to its last page's end. This one copies.
    fn write_slot(&self, page: &mut [u8], payload: &Span, at: u64) -> io::Result<()> {
        let mut slot = Pages::new(1 + payload_pages(payload));
        slot[..PAGE_BYTES].copy_from_slice(page);
        payload.copy_out(0, &mut slot[PAGE_BYTES..][..payload.bytes() as usize]);
        self.write(&slot, at)
    }
    /// The bytes are zeros from now on (durable with the next sync), and their space stays ours.
    fn erase(&self, at: u64, bytes: u64) -> io::Result<()>;
    /// What was written survives a loss of power.
    fn sync(&self) -> io::Result<()>;
}

fn payload_pages(payload: &Span) -> usize {
    (payload.bytes() as usize).div_ceil(PAGE_BYTES)
}

/// Where slot files are.
pub trait Media: Send + Sync {
    /// Numbers of the files that are there.
    fn list(&self) -> io::Result<Vec<u32>>;
    /// Opens a file and gives its length.
    fn open(&self, file: u32) -> io::Result<(Arc<dyn SlotFile>, u64)>;
    /// Makes a file of `bytes`, allocated now: later writes need no more space.
    fn create(&self, file: u32, bytes: u64) -> io::Result<Arc<dyn SlotFile>>;
    /// Removes a file; its space comes back when the last reader closes it.
    fn remove(&self, file: u32) -> io::Result<()>;
    /// Renames a file, so that it is in nobody's way.
    fn set_aside(&self, file: u32) -> io::Result<()>;
    /// Bytes that the file system has left.
    fn available(&self) -> io::Result<u64>;
    /// Whether a small write goes through.
    fn probe(&self) -> io::Result<()>;
    /// Called before each write to the index; an error here is that write's.
    fn before_index_write(&self) -> io::Result<()> {
        Ok(())
    }
    /// Whether the page cache is passed by.
    fn is_direct(&self) -> bool;
}

/// Files in a folder.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    direct: bool,
}

impl Folder {
    /// Uses `dir`, with O_DIRECT where its file system takes it.
    pub fn new(dir: &Path) -> Self {
        let mut folder = Self { dir: dir.to_owned(), direct: true };
        if let Err(error) = folder.probe() {
            tracing::warn!(
                %error, dir = %dir.display(),
                "slot files go through the page cache: the file system refuses O_DIRECT"
            );
            folder.direct = false;
        }
        folder
    }

    fn path(&self, file: u32) -> PathBuf {
        self.dir.join(format!("{PREFIX}{file:06}"))
    }

    fn options(&self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if self.direct {
            options.custom_flags(OFlags::DIRECT.bits() as i32);
        }
        options
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }
}

impl Media for Folder {
    fn list(&self) -> io::Result<Vec<u32>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let number: Option<u32> =
                name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse().ok());
            files.extend(number);
        }
        Ok(files)
    }

    fn open(&self, file: u32) -> io::Result<(Arc<dyn SlotFile>, u64)> {
        let file = self.options().open(self.path(file))?;
        let bytes = file.metadata()?.len();
        Ok((Arc::new(file), bytes))
    }

    fn create(&self, file: u32, bytes: u64) -> io::Result<Arc<dyn SlotFile>> {
        let path = self.path(file);
        let made = self.options().create(true).truncate(true).open(&path)?;
        let allocated = match rustix::fs::fallocate(&made, FallocateFlags::empty(), 0, bytes) {
            // No allocation ahead on this file system: a later write may find it full.
            Err(rustix::io::Errno::OPNOTSUPP) => made.set_len(bytes),
            other => other.map_err(io::Error::from),
        };
        if let Err(error) = allocated.and_then(|()| made.sync_all()) {
            let _ = std::fs::remove_file(&path); // Without it the space would stay half taken.
            return Err(error);
        }
        self.sync_names()?;
        Ok(Arc::new(made))
    }

    fn remove(&self, file: u32) -> io::Result<()> {
        std::fs::remove_file(self.path(file))?;
        self.sync_names()
    }

    fn set_aside(&self, file: u32) -> io::Result<()> {
        let path = self.path(file);
        std::fs::rename(&path, aside(&path, "version"))?;
        self.sync_names()
    }

    fn available(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.dir)?;
        Ok(stat.f_bavail * stat.f_frsize)
    }

    fn probe(&self) -> io::Result<()> {
        let path = self.dir.join("probe");
        let file = self.options().create(true).truncate(true).open(&path)?;
        let mut page = Pages::new(1);
        file.write_all_at(&page, 0)?;
        file.sync_data()?;
        file.read_exact_at(&mut page, 0)?;
        drop(file);
        std::fs::remove_file(&path)
    }

    fn is_direct(&self) -> bool {
        self.direct
    }
}

impl SlotFile for File {
    fn read(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(to, at)
    }

    fn write(&self, from: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(from, at)
    }

    fn read_slot(&self, page: &mut [u8], payload: &Span, at: u64) -> io::Result<()> {
        let (whole, rest) = whole_pages(payload);
        let mut last = Pages::new(usize::from(rest > 0));
        Parts::new(page, &payload.part(0, whole), &mut last).read(self, at)?;
        payload.copy_in(whole, &last[..rest]);
        Ok(())
    }

    fn write_slot(&self, page: &mut [u8], payload: &Span, at: u64) -> io::Result<()> {
        let (whole, rest) = whole_pages(payload);
        // What follows the payload in its frame may be left over from another block.
        let mut last = Pages::new(usize::from(rest > 0));
        payload.copy_out(whole, &mut last[..rest]);
        Parts::new(page, &payload.part(0, whole), &mut last).write(self, at)
    }

    fn erase(&self, at: u64, bytes: u64) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(self, punch, at, bytes) {
            Ok(()) => {
                // Allocated again, as at first. Where that fails a later write may find the
                // volume full, as on a file system that allocates nothing ahead.
                let _ = rustix::fs::fallocate(self, FallocateFlags::empty(), at, bytes);
                Ok(())
            }
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                overwrite(self, at, bytes)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// Bytes of a payload in whole pages, and what is left over.
fn whole_pages(payload: &Span) -> (u64, usize) {
    let rest = payload.bytes() % PAGE_BYTES as u64;
    (payload.bytes() - rest, rest as usize)
}

fn overwrite(file: &File, mut at: u64, bytes: u64) -> io::Result<()> {
    let zeros = Pages::new(OVERWRITTEN_PAGES);
    let end = at + bytes;
    while at < end {
        let some = (end - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..some as usize], at)?;
        at += some;
    }
    Ok(())
}

/// Whether the error says that there is no room, rather than that the drive is ill.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erased_bytes_are_zeros_whichever_way() {
        for erase in [|file: &File, at, bytes| file.erase(at, bytes), overwrite] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&vec![7; 8 * PAGE_BYTES], 0).unwrap();
            erase(&file, 2 * PAGE_BYTES as u64, 3 * PAGE_BYTES as u64).unwrap();
            let mut bytes = vec![1; 8 * PAGE_BYTES];
            file.read_exact_at(&mut bytes, 0).unwrap();
            let pages = bytes.chunks(PAGE_BYTES).map(|page| page[0]);
            assert_eq!(pages.collect::<Vec<_>>(), [7, 7, 0, 0, 0, 7, 7, 7]);
            assert!(bytes.chunks(PAGE_BYTES).all(|page| page.iter().all(|byte| *byte == page[0])));
        }
    }

    #[test]
    fn a_payload_of_broken_pages_leaves_its_slot_and_comes_back() {
        let file = tempfile::tempfile().unwrap();
        let frame = Span::heap(3 * PAGE_BYTES as u64);
        frame.copy_in(0, &[9; 3 * PAGE_BYTES]); // Left over behind the payload.
        let payload = frame.part(0, 2 * PAGE_BYTES as u64 + 5);
        let mut page = Pages::new(1);
        page.fill(3);
        SlotFile::write_slot(&file, &mut page, &payload, 0).unwrap();
        let mut bytes = vec![1; 4 * PAGE_BYTES];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let end = 3 * PAGE_BYTES + 5;
        assert!(bytes[PAGE_BYTES..end].iter().all(|byte| *byte == 9));
        assert!(bytes[end..].iter().all(|byte| *byte == 0));
        let back = Span::heap(payload.bytes());
        SlotFile::read_slot(&file, &mut page, &back, 0).unwrap();
        let mut read = vec![0; back.bytes() as usize];
        back.copy_out(0, &mut read);
        assert!(read.iter().all(|byte| *byte == 9) && page.iter().all(|byte| *byte == 3));
    }
}
