//! Flags of the daemon, checked before anything is opened.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::policy::PolicyKind;
use crate::shm::map::HugePages;
use crate::store::TenantShare;
use crate::tier::disk::Engine;
use crate::tier::remote::{RemoteUrl, UrlError};

/// Most bytes a region may have: offsets stay far from overflow.
const HOST_BYTES_MAX: u64 = 1 << 42;
/// Fewest bytes of a disk tier: RocksDB's own files need some.
pub(crate) const DISK_BYTES_MIN: u64 = 16 << 20;

/// Name of the admin API's socket, in the folder of the handshake's.
pub const ADMIN_SOCKET_FILE: &str = "admin.sock";
/// Fewest bytes a second of migrations: of four at once each must send a piece before it counts as silent.
pub(crate) const MIGRATION_RATE_MIN: u64 = 256 << 10;

/// Flags of both commands, as given.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    /// Unix socket of the handshake.
    #[arg(long, env = "COLLOQUY_SOCKET", default_value = "/run/kv/daemon.sock")]
    pub socket: PathBuf,
    /// Unix socket of the admin API, its owner's alone; by default admin.sock beside the handshake's.
    #[arg(long, env = "COLLOQUY_ADMIN_SOCKET")]
    pub admin_socket: Option<PathBuf>,
    /// Bytes of the shared region (plain, or with KiB, MiB, GiB).
    #[arg(long, env = "COLLOQUY_HOST_BYTES", value_parser = parse_bytes)]
    pub host_bytes: u64,
    /// Make the region of huge pages, which the machine (or the pod: hugepages-2Mi) must have set aside.
    #[arg(long, env = "COLLOQUY_HUGE_PAGES", value_enum)]
    pub huge_pages: Option<HugePages>,
    /// Folder of the disk tier; without it there is none.
    #[arg(long, env = "COLLOQUY_DISK_DIR")]
    pub disk_dir: Option<PathBuf>,
    /// Bytes that the disk tier may take.
    #[arg(long, env = "COLLOQUY_DISK_BYTES", value_parser = parse_bytes, default_value = "1GiB")]
    pub disk_bytes: u64,
    /// What keeps the payload on disk; by default what the folder has a store of, else slots.
    #[arg(long, env = "COLLOQUY_DISK_ENGINE", value_enum)]
    pub disk_engine: Option<Engine>,
    /// Health, metrics, status.
    #[arg(long, env = "COLLOQUY_HTTP", default_value = "0.0.0.0:9100")]
    pub http: SocketAddr,
    /// Which blocks leave the tiers first.
    #[arg(long, env = "COLLOQUY_POLICY", value_enum, default_value_t = PolicyKind::LookAhead)]
    pub policy: PolicyKind,
    /// Seconds after its last use at which a block is forgotten; 0 is never.
    #[arg(long, env = "COLLOQUY_TTL_SECONDS", default_value_t = 0)]
    pub ttl_seconds: u64,
    /// Seconds after its last use at which a conversation counts as idle and its tail goes to disk.
    #[arg(long, env = "COLLOQUY_TAIL_IDLE_SECONDS", default_value_t = 10)]
    pub tail_idle_seconds: u64,
    /// Seconds after a conversation's deletion at which no byte of it is left on disk.
    #[arg(long, env = "COLLOQUY_DELETION_DEADLINE_SECONDS", default_value_t = 60)]
    pub deletion_deadline_seconds: u64,
    /// Percent of the host tier that a tenant may have before its own blocks leave first; 100 is no bound.
    #[arg(long, env = "COLLOQUY_TENANT_HOST_SHARE", default_value_t = 100, value_parser = whole_percent())]
    pub tenant_host_share: u8,
    /// Percent of the disk tier that a tenant may have before its own blocks leave first; 100 is no bound.
    #[arg(long, env = "COLLOQUY_TENANT_DISK_SHARE", default_value_t = 100, value_parser = whole_percent())]
    pub tenant_disk_share: u8,
    /// Bytes that may be written to disk in a day; without it there is no bound.
    #[arg(long, env = "COLLOQUY_DISK_WRITE_BYTES_PER_DAY", value_parser = parse_bytes)]
    pub disk_write_bytes_per_day: Option<u64>,
    /// The same as writes of the whole disk tier (--disk-bytes) in a day, such as 0.3.
    #[arg(
        long,
        env = "COLLOQUY_DISK_DRIVE_WRITES_PER_DAY",
        conflicts_with = "disk_write_bytes_per_day"
    )]
    pub disk_drive_writes_per_day: Option<f64>,
    /// Where other daemons may fetch conversations (HTTP/2 in clear text); without it nowhere.
    #[arg(long, env = "COLLOQUY_MIGRATION_LISTEN")]
    pub migration_listen: Option<SocketAddr>,
    /// File of the secret that daemons share, 32 bytes or more; read again at each use.
    #[arg(long, env = "COLLOQUY_MIGRATION_SECRET_FILE")]
    pub migration_secret_file: Option<PathBuf>,
    /// Bytes that migrations and the remote tier may move a second, each way; 0 is no limit.
    #[arg(long, env = "COLLOQUY_MIGRATION_BYTES_PER_SECOND", value_parser = parse_bytes, default_value = "256MiB")]
    pub migration_bytes_per_second: u64,
    /// Object store of the remote tier: file:///FOLDER or s3://BUCKET/PREFIX (AWS_* variables say how).
    #[arg(long, env = "COLLOQUY_REMOTE_URL")]
    pub remote_url: Option<String>,
    /// At SIGTERM, offload conversations used within so many seconds, as far as time allows; 0 is none.
    #[arg(long, env = "COLLOQUY_REMOTE_ON_STOP_SECONDS", default_value_t = 0)]
    pub remote_on_stop_seconds: u64,
}

/// A share, from 1 to 100.
pub fn whole_percent() -> clap::builder::RangedI64ValueParser<u8> {
    clap::value_parser!(u8).range(1..=100)
}

/// Checked settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// See [`Flags::socket`].
    pub socket: PathBuf,
    /// See [`Flags::admin_socket`].
    pub admin_socket: PathBuf,
    /// Whole pages.
    pub host_bytes: u64,
    /// See [`Flags::huge_pages`].
    pub huge_pages: Option<HugePages>,
    /// See [`Flags::disk_dir`].
    pub disk_dir: Option<PathBuf>,
    /// See [`Flags::disk_bytes`].
    pub disk_bytes: u64,
    /// See [`Flags::disk_engine`].
    pub disk_engine: Option<Engine>,
    /// See [`Flags::http`].
    pub http: SocketAddr,
    /// See [`Flags::policy`].
    pub policy: PolicyKind,
    /// `None` is never.
    pub ttl: Option<Duration>,
    /// See [`Flags::tail_idle_seconds`].
    pub tail_idle: Duration,
    /// See [`Flags::tenant_host_share`].
    pub tenant_share: TenantShare,
    /// See [`Flags::disk_write_bytes_per_day`].
    pub write_bytes_per_day: Option<u64>,
    /// See [`Flags::deletion_deadline_seconds`].
    pub deletion_deadline: Duration,
    /// See [`Flags::migration_listen`].
    pub migration_listen: Option<SocketAddr>,
    /// See [`Flags::migration_secret_file`].
    pub migration_secret_file: Option<PathBuf>,
    /// See [`Flags::migration_bytes_per_second`].
    pub migration_bytes_per_second: u64,
    /// See [`Flags::remote_url`].
    pub remote_url: Option<RemoteUrl>,
    /// See [`Flags::remote_on_stop_seconds`].
    pub remote_on_stop: Option<Duration>,
}

/// A flag that cannot be: exit code 64.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A size outside its bounds.
    #[error("{flag} is {value} bytes, must be {min} to {max}")]
    Size {
        /// Which.
        flag: &'static str,
        /// Given.
        value: u64,
        /// Fewest.
        min: u64,
        /// Most.
        max: u64,
    },
    /// A rate that is none.
    #[error("{flag} is {value}, must be a number above 0")]
    Rate {
        /// Which.
        flag: &'static str,
        /// Given.
        value: String,
    },
    /// Anybody could fetch conversations.
    #[error(
        "--migration-listen needs --migration-secret-file: without a secret anybody could fetch conversations"
    )]
    NoSecret,
    /// No place.
    #[error(transparent)]
    Remote(#[from] UrlError),
    /// So slow that the other side would take it for dead.
    #[error("--migration-bytes-per-second is {value}, must be 0 (no limit) or at least {min}")]
    MigrationRate {
        /// Given.
        value: u64,
        /// Fewest.
        min: u64,
    },
}

impl TryFrom<Flags> for Config {
    type Error = ConfigError;

    fn try_from(flags: Flags) -> Result<Self, ConfigError> {
        let min = kv_protocol::layout::FRAME_TABLE_AT + (64 << 10); // Some frame of some model.
        let page_bytes = flags.huge_pages.map_or(4096, HugePages::bytes);
        let host_bytes = flags.host_bytes / page_bytes * page_bytes;
        if !(min..=HOST_BYTES_MAX).contains(&host_bytes) {
            let (flag, value, max) = ("--host-bytes", flags.host_bytes, HOST_BYTES_MAX);
            return Err(ConfigError::Size { flag, value, min, max });
        }
        if flags.disk_dir.is_some() && flags.disk_bytes < DISK_BYTES_MIN {
            let (flag, value, max) = ("--disk-bytes", flags.disk_bytes, u64::MAX);
            return Err(ConfigError::Size { flag, value, min: DISK_BYTES_MIN, max });
        }
        let drive_writes = flags.disk_drive_writes_per_day;
        if let Some(value) = drive_writes.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
            let (flag, value) = ("--disk-drive-writes-per-day", value.to_string());
            return Err(ConfigError::Rate { flag, value });
        }
        let drive_writes = drive_writes.map(|rate| (rate * flags.disk_bytes as f64) as u64);
        let beside = || flags.socket.with_file_name(ADMIN_SOCKET_FILE);
        if flags.migration_listen.is_some() && flags.migration_secret_file.is_none() {
            return Err(ConfigError::NoSecret);
        }
        let rate = flags.migration_bytes_per_second;
        if (1..MIGRATION_RATE_MIN).contains(&rate) {
            return Err(ConfigError::MigrationRate { value: rate, min: MIGRATION_RATE_MIN });
        }
        Ok(Self {
            admin_socket: flags.admin_socket.unwrap_or_else(beside),
            socket: flags.socket,
            host_bytes,
            huge_pages: flags.huge_pages,
            disk_dir: flags.disk_dir,
            disk_bytes: flags.disk_bytes,
            disk_engine: flags.disk_engine,
            http: flags.http,
            policy: flags.policy,
            ttl: (flags.ttl_seconds > 0).then(|| Duration::from_secs(flags.ttl_seconds)),
            tail_idle: Duration::from_secs(flags.tail_idle_seconds),
            tenant_share: TenantShare {
                host: flags.tenant_host_share,
                disk: flags.tenant_disk_share,
            },
            write_bytes_per_day: flags.disk_write_bytes_per_day.or(drive_writes),
            deletion_deadline: Duration::from_secs(flags.deletion_deadline_seconds),
            migration_listen: flags.migration_listen,
            migration_secret_file: flags.migration_secret_file,
            migration_bytes_per_second: flags.migration_bytes_per_second,
            remote_url: flags.remote_url.map(|url| url.parse()).transpose()?,
            remote_on_stop: (flags.remote_on_stop_seconds > 0)
                .then(|| Duration::from_secs(flags.remote_on_stop_seconds)),
        })
    }
}

/// Bytes, plain or with a unit: KiB to TiB are powers of 1,024, KB to TB of 1,000.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a number of bytes"))?;
    let factor: u64 = match &text[digits.len()..] {
        "" => 1,
        "Ki" | "KiB" => 1 << 10,
        "Mi" | "MiB" => 1 << 20,
        "Gi" | "GiB" => 1 << 30,
        "Ti" | "TiB" => 1 << 40,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        unit => return Err(format!("unknown unit {unit:?}: use KiB to TiB, or KB to TB")),
    };
    number.checked_mul(factor).ok_or_else(|| format!("{text} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_plain_and_with_units() {
        assert_eq!(parse_bytes("1048576"), Ok(1 << 20));
        assert_eq!(parse_bytes("2GiB"), Ok(2 << 30));
        assert_eq!(parse_bytes("512Mi"), Ok(512 << 20));
        assert_eq!(parse_bytes("5GB"), Ok(5_000_000_000));
        assert!(parse_bytes("12 parsecs").is_err());
        assert!(parse_bytes("99999999999TiB").is_err());
    }
}
