//! The seam under slot files: everything that can fail on a drive goes through it, so that tests can
//! make it fail.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, OFlags};

use super::buffers::Buffers;
use super::format::PAGE_BYTES;

/// Slot files are `slots-<number>`.
const PREFIX: &str = "slots-";

/// A file of slots. Offsets, lengths and addresses are multiples of [`PAGE_BYTES`].
pub trait SlotFile: Send + Sync {
    /// Fills `to`, or fails.
    fn read(&self, to: &mut [u8], at: u64) -> io::Result<()>;
    /// Writes all of `from`, or fails and may have written some.
    fn write(&self, from: &[u8], at: u64) -> io::Result<()>;
    /// What was written survives a loss of power.
    fn sync(&self) -> io::Result<()>;
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

    fn available(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.dir)?;
        Ok(stat.f_bavail * stat.f_frsize)
    }

    fn probe(&self) -> io::Result<()> {
        let path = self.dir.join("probe");
        let file = self.options().create(true).truncate(true).open(&path)?;
        let buffers = Buffers::default();
        let mut page = buffers.take(PAGE_BYTES);
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

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// Whether the error says that there is no room, rather than that the drive is ill.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}
