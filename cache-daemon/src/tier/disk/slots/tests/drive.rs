//! A drive in memory that fails, forgets and lies.
//!
//! What was synced is kept apart from what was only written, so that a loss of power can forget it. What
//! this cannot see: a real file system's order of metadata, and O_DIRECT; the daemon's tests and the
//! benchmark run on real files.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::tier::disk::slots::format::PAGE_BYTES;
use crate::tier::disk::slots::media::{Media, SlotFile};

pub const EIO: i32 = 5;
pub const ENOSPC: i32 = 28;
pub const EROFS: i32 = 30;

#[derive(Default)]
struct FileBytes {
    written: Vec<u8>,
    durable: Vec<u8>,
}

/// A drive in memory.
#[derive(Default)]
pub struct Drive {
    files: Mutex<BTreeMap<u32, Arc<Mutex<FileBytes>>>>,
    pub faults: Arc<Faults>,
}

/// What goes wrong, and when.
#[derive(Default)]
pub struct Faults {
    /// Errno of every write, sync and creation from now on; 0 is none.
    pub writes_fail: AtomicU64,
    /// Errno of every read.
    pub reads_fail: AtomicU64,
    /// Steps (writes, syncs, index batches) until the power fails; 0 is never.
    pub steps_left: AtomicU64,
    pub power_failed: AtomicBool,
    /// Half of the write that the power failed in reaches the drive.
    pub tears: AtomicBool,
    /// Writes are acknowledged and lost.
    pub loses_writes: AtomicBool,
    /// Called in the middle of each read.
    pub during_read: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Faults {
    fn error(errno: &AtomicU64) -> io::Result<()> {
        match errno.load(Ordering::Relaxed) {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code as i32)),
        }
    }

    /// One step towards the power cut; `Ok(false)` is the step in which it happens.
    fn step(&self) -> io::Result<bool> {
        Self::error(&self.writes_fail)?;
        if self.power_failed.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        let cut = match self.steps_left.load(Ordering::Relaxed) {
            0 => false,
            left => {
                self.steps_left.store(left - 1, Ordering::Relaxed);
                left == 1
            }
        };
        if cut {
            self.power_failed.store(true, Ordering::Relaxed);
        }
        Ok(!cut)
    }

    fn whole_step(&self) -> io::Result<()> {
        let done = self.step()?;
        if done { Ok(()) } else { Err(io::Error::from_raw_os_error(EIO)) }
    }
}

impl Drive {
    /// What is there after the power came back: `keep` decides for each page that was not synced.
    pub fn after_power_loss(&self, mut keep: impl FnMut() -> bool) -> Arc<Self> {
        let files = self.files.lock().unwrap();
        let mut survive = |bytes: &Arc<Mutex<FileBytes>>| {
            let bytes = bytes.lock().unwrap();
            let mut durable = bytes.durable.clone();
            durable.resize(bytes.written.len(), 0);
            let pages = durable.chunks_mut(PAGE_BYTES).zip(bytes.written.chunks(PAGE_BYTES));
            for (old, new) in pages {
                if old != new && keep() {
                    old.copy_from_slice(new);
                }
            }
            Arc::new(Mutex::new(FileBytes { written: durable.clone(), durable }))
        };
        let files = files.iter().map(|(number, bytes)| (*number, survive(bytes))).collect();
        Arc::new(Self { files: Mutex::new(files), faults: Arc::default() })
    }

    pub fn same_again(&self) -> Arc<Self> {
        self.after_power_loss(|| true)
    }

    pub fn flip(&self, at: u64, bit: u8) {
        let files = self.files.lock().unwrap();
        let mut at = at as usize;
        for file in files.values() {
            let mut bytes = file.lock().unwrap();
            if at < bytes.written.len() {
                bytes.written[at] ^= 1 << bit;
                return;
            }
            at -= bytes.written.len();
        }
        panic!("{at} is behind the last byte");
    }

    /// Whether some file has these bytes, synced or not.
    pub fn contains(&self, needle: &[u8]) -> bool {
        let files = self.files.lock().unwrap();
        let has = |bytes: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        files.values().any(|file| {
            let file = file.lock().unwrap();
            has(&file.written) || has(&file.durable)
        })
    }

    pub fn bytes(&self) -> u64 {
        let files = self.files.lock().unwrap();
        files.values().map(|file| file.lock().unwrap().written.len() as u64).sum()
    }
}

struct DriveFile {
    bytes: Arc<Mutex<FileBytes>>,
    faults: Arc<Faults>,
}

impl SlotFile for DriveFile {
    fn read(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        Faults::error(&self.faults.reads_fail)?;
        let hook = self.faults.during_read.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
        let bytes = self.bytes.lock().unwrap();
        to.copy_from_slice(&bytes.written[at as usize..at as usize + to.len()]);
        Ok(())
    }

    fn write(&self, from: &[u8], at: u64) -> io::Result<()> {
        let whole = self.faults.step()?;
        if self.faults.loses_writes.load(Ordering::Relaxed) {
            return Ok(());
        }
        let tears = self.faults.tears.load(Ordering::Relaxed);
        let length = if whole || !tears { from.len() } else { from.len() / 2 };
        let mut bytes = self.bytes.lock().unwrap();
        bytes.written[at as usize..at as usize + length].copy_from_slice(&from[..length]);
        if whole { Ok(()) } else { Err(io::Error::from_raw_os_error(EIO)) }
    }

    fn erase(&self, at: u64, bytes: u64) -> io::Result<()> {
        self.faults.whole_step()?;
        let mut file = self.bytes.lock().unwrap();
        file.written[at as usize..(at + bytes) as usize].fill(0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.faults.whole_step()?;
        let mut bytes = self.bytes.lock().unwrap();
        bytes.durable = bytes.written.clone();
        Ok(())
    }
}

impl Media for Drive {
    fn list(&self) -> io::Result<Vec<u32>> {
        Ok(self.files.lock().unwrap().keys().copied().collect())
    }

    fn open(&self, file: u32) -> io::Result<(Arc<dyn SlotFile>, u64)> {
        let bytes = self.files.lock().unwrap()[&file].clone();
        let length = bytes.lock().unwrap().written.len() as u64;
        Ok((Arc::new(DriveFile { bytes, faults: self.faults.clone() }), length))
    }

    fn create(&self, file: u32, bytes: u64) -> io::Result<Arc<dyn SlotFile>> {
        self.faults.whole_step()?;
        let made = FileBytes { written: vec![0; bytes as usize], durable: Vec::new() };
        let made = Arc::new(Mutex::new(made));
        self.files.lock().unwrap().insert(file, made.clone());
        Ok(Arc::new(DriveFile { bytes: made, faults: self.faults.clone() }))
    }

    fn remove(&self, file: u32) -> io::Result<()> {
        self.files.lock().unwrap().remove(&file);
        Ok(())
    }

    fn set_aside(&self, file: u32) -> io::Result<()> {
        self.remove(file)
    }

    fn available(&self) -> io::Result<u64> {
        Ok(1 << 40)
    }

    fn probe(&self) -> io::Result<()> {
        self.faults.whole_step()
    }

    fn before_index_write(&self) -> io::Result<()> {
        self.faults.whole_step()
    }

    fn is_direct(&self) -> bool {
        false
    }
}
