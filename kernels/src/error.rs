//! Why a kernel refuses its arguments.

/// A shape that a kernel cannot take; found before any memory is touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// A length is not what the other arguments imply.
    #[error("{what}: expected {expected}, got {got}")]
    Shape {
        /// Which argument.
        what: &'static str,
        /// What it must be.
        expected: usize,
        /// What it is.
        got: usize,
    },
    /// A size does not divide as the kernel's blocks need.
    #[error("{what} is {got}, which is not a multiple of {unit}")]
    Multiple {
        /// Which size.
        what: &'static str,
        /// What it must be a multiple of.
        unit: usize,
        /// What it is.
        got: usize,
    },
}

impl LaunchError {
    /// `Ok` when both are equal.
    pub fn check_equal(what: &'static str, expected: usize, got: usize) -> Result<(), Self> {
        if expected == got { Ok(()) } else { Err(Self::Shape { what, expected, got }) }
    }

    /// `Ok` when `got` is a positive multiple of `unit`.
    pub fn check_multiple(what: &'static str, unit: usize, got: usize) -> Result<(), Self> {
        if got > 0 && got.is_multiple_of(unit) {
            Ok(())
        } else {
            Err(Self::Multiple { what, unit, got })
        }
    }
}
