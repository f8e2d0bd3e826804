//! The store's folder: its version, what is set aside, how much lies there.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::FORMAT_VERSION;
use super::index::Index;
use super::media::Media;
use crate::tier::disk::DiskError;

/// The format's version in decimal digits, written before anything else.
pub const FORMAT_FILE: &str = "FORMAT";
/// What the name of an index that was set aside begins with.
const INDEX_ASIDE: &str = "index.";

/// Bytes allocated by the files under a folder.
pub fn folder_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let bytes = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    };
    entries.flatten().map(bytes).sum()
}

/// A name beside `path` that nothing has.
pub fn aside(path: &Path, why: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    (1..=u32::MAX)
        .map(|number| path.with_file_name(format!("{name}.{why}-{number}")))
        .find(|path| !path.exists())
        .expect("some number is free")
}

/// Makes the folder. A store of a version that we do not know is set aside first, whole: a newer
/// Colloquy may read it again.
pub fn make_home(home: &Path) -> io::Result<()> {
    let ours = FORMAT_VERSION.to_string();
    let format = home.join(FORMAT_FILE);
    if home.exists() {
        let found = std::fs::read_to_string(&format).unwrap_or_default();
        if found.trim() == ours {
            return Ok(());
        }
        if std::fs::read_dir(home)?.next().is_some() {
            let digits = found.trim().chars().filter(char::is_ascii_digit).take(10);
            let version: String = digits.collect();
            let aside = aside(home, &format!("version-{version}"));
            tracing::warn!(version, ours, to = %aside.display(), "store set aside");
            std::fs::rename(home, &aside)?;
        }
    }
    std::fs::create_dir_all(home)?;
    let new = home.with_extension("new-format");
    std::fs::write(&new, ours + "\n")?;
    std::fs::File::open(&new)?.sync_all()?;
    std::fs::rename(&new, &format)?;
    std::fs::File::open(home)?.sync_all()
}

/// Indexes set aside hold records, which an erasure has to reach.
pub fn remove_indexes_aside(home: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(home)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(INDEX_ASIDE) {
            tracing::info!(folder = %entry.path().display(), "an index set aside is erased");
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Sets an index aside and makes an empty one.
pub fn start_index_anew(home: &Path, media: Arc<dyn Media>, why: &str) -> Result<Index, DiskError> {
    let aside = aside(home, why);
    tracing::error!(to = %aside.display(), "index set aside; it is made again from the slots");
    std::fs::rename(home, &aside)
        .map_err(|source| DiskError::Io { what: "setting the index aside", source })?;
    Index::open(home, media)
}
