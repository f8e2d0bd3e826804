//! A drive under a real daemon that is slow or fails on command: `faults.c`, preloaded.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What the drive does from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// So many bytes a second.
    Slow(u64),
    /// Reads fail with this errno.
    Read(i32),
    /// Writes and syncs fail with this errno.
    Write(i32),
}

pub const EIO: i32 = 5;
pub const ENOSPC: i32 = 28;
pub const EROFS: i32 = 30;

/// See the module.
pub struct Faults {
    library: PathBuf,
    control: PathBuf,
    disk: PathBuf,
}

impl Faults {
    /// For a daemon that is to be started in `dir`.
    pub fn new(dir: &Path) -> Self {
        let (source, library) = (dir.join("faults.c"), dir.join("faults.so"));
        std::fs::write(&source, include_str!("faults.c")).expect("a folder of the test's");
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O2", "-o"])
            .args([&library, &source])
            .status()
            .expect("a C compiler: RocksDB needs one as well");
        assert!(compiled.success(), "faults.c does not compile");
        let faults = Self { library, control: dir.join("fault"), disk: dir.join("disk") };
        faults.set(Fault::None);
        faults
    }

    /// Variables of the daemon's environment.
    pub fn environment(&self) -> [(&'static str, &Path); 3] {
        [
            ("LD_PRELOAD", &self.library),
            ("FAULTS_CONTROL", &self.control),
            ("FAULTS_DIR", &self.disk),
        ]
    }

    /// From the next call on.
    pub fn set(&self, fault: Fault) {
        let line = match fault {
            Fault::None => "none 0".to_owned(),
            Fault::Slow(rate) => format!("slow {rate}"),
            Fault::Read(errno) => format!("read {errno}"),
            Fault::Write(errno) => format!("write {errno}"),
        };
        let new = self.control.with_extension("new");
        std::fs::write(&new, line).expect("a folder of the test's");
        std::fs::rename(&new, &self.control).expect("a folder of the test's"); // Never seen half written.
    }
}
