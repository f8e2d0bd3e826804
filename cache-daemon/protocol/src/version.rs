//! Versions of the region's layout and of the messages in it: one number for both.

/// Newest first, each saying what changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum LayoutVersion {
    /// A key list may be that of a truncated history; a runtime says which frame was wrong, and hears whether
    /// a conversation was truncated or deleted; a record counts its shared blocks. Block headers are as in V1,
    /// and those of all versions are read.
    V4 = 4,
    /// A hint may foretell a turn that is not in the queue; a key list may begin under a shared root;
    /// runtimes are told of changed conversations; conversation records are typed ([`crate::record`]).
    /// Block headers are as in V1, and those of V1 and V2 are read.
    V3 = 3,
    /// Up to seven pins go back in one message. Block headers are as in V1, and V1's are read.
    V2 = 2,
    /// First layout.
    V1 = 1,
}

impl LayoutVersion {
    /// What this build writes; of regions and handshakes the only one that it takes.
    pub const CURRENT: LayoutVersion = LayoutVersion::V4;

    /// Checks the number of a region or a handshake: both sides must speak the same messages.
    pub fn check_current(found: u32) -> Result<(), UnknownVersion> {
        if found == Self::CURRENT as u32 { Ok(()) } else { Err(UnknownVersion { found }) }
    }
}

/// A number that names no layout known to this build, or not the one needed.
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
            2 => Ok(LayoutVersion::V2),
            3 => Ok(LayoutVersion::V3),
            4 => Ok(LayoutVersion::V4),
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
        assert_eq!(LayoutVersion::check_current(number), Ok(()));
    }

    #[test]
    fn blocks_of_the_versions_before_are_read_but_not_their_messages() {
        for (found, version) in [(1, LayoutVersion::V1), (2, LayoutVersion::V2)] {
            assert_eq!(LayoutVersion::try_from(found), Ok(version));
            assert_eq!(LayoutVersion::check_current(found), Err(UnknownVersion { found }));
        }
    }
}
