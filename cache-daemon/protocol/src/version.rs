//! Versions of the region's layout and of the messages in it: one number for both.

/// Newest first, each saying what changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum LayoutVersion {
    /// First layout.
    V1 = 1,
}

impl LayoutVersion {
    /// What this build writes, and the only one that it reads.
    pub const CURRENT: LayoutVersion = LayoutVersion::V1;
}

/// A number that names no layout known to this build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "layout version {found} is not known here (this build speaks {}): run daemon and runtime of one release",
    LayoutVersion::CURRENT as u32
)]
pub struct UnknownVersion {
    /// The number read.
    pub found: u32,
}

impl TryFrom<u32> for LayoutVersion {
    type Error = UnknownVersion;

    fn try_from(found: u32) -> Result<Self, UnknownVersion> {
        match found {
            1 => Ok(LayoutVersion::V1),
            _ => Err(UnknownVersion { found }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_version_reads_back() {
        let number = LayoutVersion::CURRENT as u32;
        assert_eq!(LayoutVersion::try_from(number), Ok(LayoutVersion::CURRENT));
        assert_eq!(LayoutVersion::try_from(0), Err(UnknownVersion { found: 0 }));
    }
}
