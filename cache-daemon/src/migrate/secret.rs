//! Authentication between daemons by a shared secret that never crosses the wire. Pure but for reading
//! the secret's file.
//!
//! A request carries a time stamp, a nonce and a keyed BLAKE3 over method, path, both of them and the body's
//! digest. The answer's sections are sealed with a key that is derived from the secret and this very request
//! ([`Secret::answer_key`]): an answer cannot be made up, changed, or taken from an earlier request.
//! Nothing is encrypted: conversations cross the network in clear, as all traffic of the pods does.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::bundle::SealKey;

/// Fewest bytes of a secret: as many as the keys made of it.
pub const SECRET_BYTES_MIN: usize = 32;
/// Most bytes of its file: more is a wrong file.
const SECRET_BYTES_MAX: u64 = 4096;
/// How far the clocks of two daemons may be apart.
pub const CLOCK_SKEW_MAX: Duration = Duration::from_mins(2);
/// Requests remembered so that none is answered twice: 270 a second over twice the skew.
const REMEMBERED_MAX: usize = 1 << 16;
/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 16;

const REQUEST_CONTEXT: &str = "colloquy 2026-11 migration request";
const ANSWER_CONTEXT: &str = "colloquy 2026-11 migration answer";

/// Why there is no secret to use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// The file cannot be read.
    #[error("migration secret {path}: {source}")]
    Read {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Too short to be a secret, or too long.
    #[error(
        "migration secret has {found} bytes, must have {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX}: make one with `head -c 32 /dev/urandom | base64`"
    )]
    Length {
        /// In the file, white space at its end left out.
        found: usize,
    },
}

/// Why a request is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthError {
    /// Headers are missing, or are not what they should be.
    #[error("the request is not signed: daemons sign with the secret of --migration-secret-file")]
    Unsigned,
    /// Another secret, or a request changed on the way.
    #[error("the request is signed with another secret: mount the same one on both daemons")]
    WrongSecret,
    /// Too old, or from the future.
    #[error(
        "the request's clock is {skew_ms} ms away from ours, allowed are {} ms: set the nodes' clocks",
        CLOCK_SKEW_MAX.as_millis()
    )]
    Clock {
        /// Between the two.
        skew_ms: u64,
    },
    /// Seen before.
    #[error("the request was answered before: somebody repeats it")]
    Replay,
    /// More requests than are remembered.
    #[error("too many requests at once: ask again later")]
    Busy,
}

/// What both daemons know.
#[derive(Clone)]
pub struct Secret {
    request_key: [u8; blake3::KEY_LEN],
    answer_key: [u8; blake3::KEY_LEN],
}

/// What a request says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signature {
    /// Of the asking daemon's clock, Unix milliseconds.
    pub time_ms: u64,
    /// Drawn for this request.
    pub nonce: [u8; NONCE_BYTES],
    /// Over all of the request.
    pub mac: blake3::Hash,
}

impl Secret {
    /// Of the bytes of a secret's file; white space at the end is left out.
    pub fn new(bytes: &[u8]) -> Result<Self, SecretError> {
        let bytes = bytes.trim_ascii_end();
        if bytes.len() < SECRET_BYTES_MIN {
            return Err(SecretError::Length { found: bytes.len() });
        }
        Ok(Self {
            request_key: blake3::derive_key(REQUEST_CONTEXT, bytes),
            answer_key: blake3::derive_key(ANSWER_CONTEXT, bytes),
        })
    }

    /// Reads a secret's file, anew at each use: a mounted secret may change at any time.
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        let failed = |source| SecretError::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(failed)?;
        let mut bytes = Vec::new();
        file.take(SECRET_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > SECRET_BYTES_MAX {
            return Err(SecretError::Length { found: bytes.len() });
        }
        Self::new(&bytes)
    }

    /// Signs a request.
    pub fn sign(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
        time_ms: u64,
        nonce: [u8; NONCE_BYTES],
    ) -> Signature {
        let mut hasher = blake3::Hasher::new_keyed(&self.request_key);
        for part in [method.as_bytes(), path.as_bytes()] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        hasher.update(&time_ms.to_le_bytes()).update(&nonce);
        hasher.update(blake3::hash(body).as_bytes());
        Signature { time_ms, nonce, mac: hasher.finalize() }
    }

    /// Whether a request was signed with this secret; in constant time.
    pub fn verify(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
        signature: &Signature,
    ) -> Result<(), AuthError> {
        let ours = self.sign(method, path, body, signature.time_ms, signature.nonce);
        // Equality of `blake3::Hash` takes the same time for all values.
        if ours.mac == signature.mac { Ok(()) } else { Err(AuthError::WrongSecret) }
    }

    /// What the answer to a request is sealed with.
    pub fn answer_key(&self, request: &Signature) -> SealKey {
        SealKey(*blake3::keyed_hash(&self.answer_key, request.mac.as_bytes()).as_bytes())
    }
}

impl Signature {
    /// For the request's header.
    pub fn encode(&self) -> String {
        format!("{}.{}.{}", self.time_ms, hex(&self.nonce), self.mac.to_hex())
    }

    /// Reads what [`Signature::encode`] wrote.
    pub fn decode(text: &str) -> Result<Self, AuthError> {
        let parse = || {
            let mut parts = text.split('.');
            let (time, nonce, mac) = (parts.next()?, parts.next()?, parts.next()?);
            if parts.next().is_some() {
                return None;
            }
            let time_ms = time.parse().ok()?;
            let nonce = from_hex(nonce)?;
            Some(Self { time_ms, nonce, mac: blake3::Hash::from_hex(mac).ok()? })
        };
        parse().ok_or(AuthError::Unsigned)
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // A string takes everything.
        text
    })
}

/// Exactly `N` bytes of hexadecimal.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(bytes)
}

/// Lets each signed request in once, and only while it is fresh. Signatures are checked before: nobody
/// without the secret fills it.
#[derive(Debug, Default)]
pub struct Gate {
    seen: BTreeSet<(u64, [u8; NONCE_BYTES])>,
}

impl Gate {
    /// Takes note of a request, or refuses it.
    pub fn admit(&mut self, now_ms: u64, request: &Signature) -> Result<(), AuthError> {
        let skew_max_ms = CLOCK_SKEW_MAX.as_millis() as u64;
        let skew_ms = now_ms.abs_diff(request.time_ms);
        if skew_ms > skew_max_ms {
            return Err(AuthError::Clock { skew_ms });
        }
        let oldest_ms = now_ms.saturating_sub(skew_max_ms);
        while self.seen.first().is_some_and(|(time_ms, _)| *time_ms < oldest_ms) {
            self.seen.pop_first(); // Its clock refuses it from now on.
        }
        if self.seen.contains(&(request.time_ms, request.nonce)) {
            return Err(AuthError::Replay);
        }
        if self.seen.len() >= REMEMBERED_MAX {
            return Err(AuthError::Busy);
        }
        self.seen.insert((request.time_ms, request.nonce));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_000_000_000;

    fn secret(byte: u8) -> Secret {
        Secret::new(&[byte; 32]).unwrap()
    }

    fn signed(time_ms: u64, nonce: u8) -> Signature {
        secret(1).sign("GET", "/a", b"", time_ms, [nonce; NONCE_BYTES])
    }

    #[test]
    fn a_signature_holds_for_its_own_request_only() {
        let signature = secret(1).sign("POST", "/blocks", b"body", NOW, [3; 16]);
        let verify = |secret: Secret, method, path, body, signature: &Signature| {
            secret.verify(method, path, body, signature)
        };
        let wrong = Err(AuthError::WrongSecret);
        assert_eq!(verify(secret(1), "POST", "/blocks", b"body", &signature), Ok(()));
        assert_eq!(verify(secret(2), "POST", "/blocks", b"body", &signature), wrong);
        assert_eq!(verify(secret(1), "GET", "/blocks", b"body", &signature), wrong);
        assert_eq!(verify(secret(1), "POST", "/block", b"body", &signature), wrong);
        assert_eq!(verify(secret(1), "POST", "/blocks", b"Body", &signature), wrong);
        let later = Signature { time_ms: NOW + 1, ..signature };
        assert_eq!(verify(secret(1), "POST", "/blocks", b"body", &later), wrong);
        let other = Signature { nonce: [4; 16], ..signature };
        assert_eq!(verify(secret(1), "POST", "/blocks", b"body", &other), wrong);
    }

    #[test]
    fn answers_to_two_requests_have_two_keys() {
        let key = |signature| secret(1).answer_key(&signature).0;
        assert_ne!(key(signed(NOW, 1)), key(signed(NOW, 2)));
        assert_eq!(key(signed(NOW, 1)), key(signed(NOW, 1)));
        assert_ne!(key(signed(NOW, 1)), secret(2).answer_key(&signed(NOW, 1)).0);
    }

    #[test]
    fn a_secret_file_is_read_without_its_last_newline_and_never_short() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        assert!(matches!(Secret::read(&path), Err(SecretError::Read { .. })));
        std::fs::write(&path, [b'a'; 31]).unwrap();
        assert!(matches!(Secret::read(&path), Err(SecretError::Length { found: 31 })));
        std::fs::write(&path, format!("{}\n", "a".repeat(32))).unwrap();
        assert!(Secret::read(&path).unwrap().request_key == secret(b'a').request_key);
        std::fs::write(&path, vec![b'a'; 5000]).unwrap();
        assert!(matches!(Secret::read(&path), Err(SecretError::Length { .. })));
    }

    #[test]
    fn a_request_is_let_in_once_and_only_while_it_is_fresh() {
        let mut gate = Gate::default();
        let skew_ms = CLOCK_SKEW_MAX.as_millis() as u64;
        assert_eq!(gate.admit(NOW, &signed(NOW, 1)), Ok(()));
        assert_eq!(gate.admit(NOW, &signed(NOW, 1)), Err(AuthError::Replay));
        assert_eq!(gate.admit(NOW, &signed(NOW, 2)), Ok(()));
        let old = signed(NOW - skew_ms - 1, 3);
        assert_eq!(gate.admit(NOW, &old), Err(AuthError::Clock { skew_ms: skew_ms + 1 }));
        let early = signed(NOW + skew_ms, 4);
        assert_eq!(gate.admit(NOW, &early), Ok(()));
        // As long as its clock would let it in, it is remembered.
        assert_eq!(gate.admit(NOW + 2 * skew_ms, &early), Err(AuthError::Replay));
        assert!(gate.admit(NOW + 2 * skew_ms + 1, &early).is_err());
        assert_eq!(gate.seen.len(), 1);
    }

    #[test]
    fn the_gate_remembers_no_more_than_its_bound() {
        let mut gate = Gate::default();
        for number in 0..REMEMBERED_MAX as u64 {
            let mut nonce = [0; NONCE_BYTES];
            nonce[..8].copy_from_slice(&number.to_le_bytes());
            gate.seen.insert((NOW, nonce));
        }
        assert_eq!(gate.admit(NOW, &signed(NOW, 9)), Err(AuthError::Busy));
        let later = NOW + CLOCK_SKEW_MAX.as_millis() as u64 + 1;
        assert_eq!(gate.admit(later, &signed(later, 9)), Ok(()));
        assert_eq!(gate.seen.len(), 1);
    }

    proptest! {
        #[test]
        fn signatures_read_back_and_nonsense_is_refused(
            time_ms: u64, nonce: [u8; NONCE_BYTES], text in "[0-9a-f.x]{0,120}",
        ) {
            let signature = secret(1).sign("GET", "/", b"", time_ms, nonce);
            prop_assert_eq!(Signature::decode(&signature.encode()), Ok(signature));
            let _ = Signature::decode(&text);
        }
    }
}
