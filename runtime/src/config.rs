//! Settings of the runtime: the command line as it was typed ([`Arguments`]), then as it is valid
//! ([`Config`]). Checked before the model is opened or a port is bound.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;

use clap::{ArgAction, Parser, ValueEnum};

use crate::adaskip::policy::{Reuse, SkipConfig};

/// A KV block is a multiple of the CPU kernels' narrowest tile.
const TOKENS_PER_BLOCK_MULTIPLE: u16 = 16;
/// Above this a block no longer fits the daemon's frames for any model we serve.
const TOKENS_PER_BLOCK_MAX: u16 = 1024;
/// More compute threads than this is a typing error, not a machine.
const THREADS_MAX: usize = 1024;
/// Bounds of the scheduler's tables: a step walks all running sequences.
const SEQUENCES_MAX: usize = 4096;
/// Declared prompts: each request is compared with all of them.
const SHARED_PREFIXES_MAX: usize = 16;
/// Bytes of one: half of what the system takes as one argument.
const SHARED_PREFIX_BYTES_MAX: usize = 64 << 10;
/// Each waiting request holds its prompt's ids.
const WAITING_MAX: usize = 1 << 16;

/// The command line; each flag can also be given as the environment variable that `--help` names.
#[derive(Debug, Clone, Parser)]
#[command(
    args_override_self = true, // The last of two wins, so that a default line can be amended.
    name = "runtime",
    version,
    about = "Colloquy's inference server: the OpenAI API over one model"
)]
pub struct Arguments {
    /// Model file (.gguf), or a folder that holds exactly one
    #[arg(long, env = "COLLOQUY_MODEL", value_name = "PATH")]
    model: PathBuf,
    /// Name under which the API serves the model [default: the file's name without .gguf]
    #[arg(long, env = "COLLOQUY_SERVED_NAME", value_name = "NAME")]
    served_name: Option<String>,
    /// Address of the API
    #[arg(long, env = "COLLOQUY_HTTP", value_name = "ADDRESS", default_value = "0.0.0.0:8000")]
    http: SocketAddr,
    /// Socket of the cache daemon; without it nothing is cached beyond device memory
    #[arg(long, env = "COLLOQUY_CACHE_SOCKET", value_name = "PATH")]
    cache_socket: Option<PathBuf>,
    /// Memory of the device's KV pool, in bytes or as 512Mi, 2GiB
    #[arg(long, env = "COLLOQUY_DEVICE_BYTES", value_name = "BYTES", default_value = "512Mi", value_parser = bytes)]
    device_bytes: u64,
    /// Sequences that one step computes together
    #[arg(long, env = "COLLOQUY_SEQUENCES_MAX", value_name = "N", default_value_t = 8)]
    sequences_max: usize,
    /// Requests that may wait for a place; more are answered 503
    #[arg(long, env = "COLLOQUY_WAITING_MAX", value_name = "N", default_value_t = 256)]
    waiting_max: usize,
    /// Longest context in tokens; 0 is the model's own
    #[arg(long, env = "COLLOQUY_CONTEXT_MAX", value_name = "N", default_value_t = 0)]
    context_max: u32,
    /// Tokens in a KV block
    #[arg(long, env = "COLLOQUY_TOKENS_PER_BLOCK", value_name = "N", default_value_t = 64)]
    tokens_per_block: u16,
    /// Tokens that one step computes at most, over all sequences
    #[arg(long, env = "COLLOQUY_STEP_TOKENS_MAX", value_name = "N", default_value_t = 512)]
    step_tokens_max: usize,
    /// Compute threads; 0 is one a core
    #[arg(long, env = "COLLOQUY_THREADS", value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Sublayers that AdaSkip skips in prefill
    #[arg(long, env = "COLLOQUY_ADASKIP_PREFILL", value_name = "K", default_value_t = 0)]
    adaskip_prefill: usize,
    /// Sublayers that AdaSkip skips in decode
    #[arg(long, env = "COLLOQUY_ADASKIP_DECODE", value_name = "K", default_value_t = 0)]
    adaskip_decode: usize,
    /// Decoded tokens from which a sequence's extra skips are learned
    #[arg(long, env = "COLLOQUY_ADASKIP_LEARN_TOKENS", value_name = "P", default_value_t = 20)]
    adaskip_learn_tokens: u32,
    /// Whether a sequence may skip further FFNs in decode
    #[arg(long, env = "COLLOQUY_ADASKIP_EXTRAS", value_name = "BOOL", default_value_t = false,
          action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    adaskip_extras: bool,
    /// Whose KV a request takes: what it would compute itself, or any that has the layers it runs
    #[arg(long, env = "COLLOQUY_REUSE", value_name = "WHOSE", default_value = "own")]
    reuse: ReuseArgument,
    /// System prompt whose leading blocks all tenants share, to the letter as clients send it; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, action = ArgAction::Append)]
    shared_prefix: Vec<String>,
    /// Enable POST /admin/device-cache/clear
    #[arg(long, env = "COLLOQUY_ADMIN")]
    admin: bool,
    /// Form of the log on stderr
    #[arg(long, env = "COLLOQUY_LOG_FORMAT", value_name = "FORM", default_value = "text")]
    log_format: LogFormat,
    /// What to log: a level, or tracing's filters (info,runtime=debug)
    #[arg(long, env = "COLLOQUY_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ReuseArgument {
    Own,
    Any,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// Settings that fit together; what depends on the model is checked when it is loaded.
#[derive(Debug, Clone)]
pub struct Config {
    /// A `.gguf`, or a folder that holds one.
    pub model: PathBuf,
    /// `None`: derived from the file's name.
    pub served_name: Option<String>,
    /// Address of the API.
    pub http: SocketAddr,
    /// The daemon's socket.
    pub cache_socket: Option<PathBuf>,
    /// Size of the device pool.
    pub device_bytes: u64,
    /// At least one.
    pub sequences_max: usize,
    /// At least one.
    pub waiting_max: usize,
    /// `None`: the model's.
    pub context_max: Option<NonZeroU32>,
    /// A multiple of 16.
    pub tokens_per_block: u16,
    /// At least [`Config::sequences_max`], so that every running sequence can decode in each step.
    pub step_tokens_max: usize,
    /// Compute threads.
    pub threads: NonZeroUsize,
    /// System prompts that all tenants share.
    pub shared_prefixes: Vec<String>,
    /// AdaSkip.
    pub skip: SkipConfig,
    /// Whether admin calls are open.
    pub admin: bool,
}

/// A setting that cannot be: exit code 64.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Out of its range.
    #[error("--{flag} is {value}; it must be {must}")]
    Range {
        /// Without dashes.
        flag: &'static str,
        /// As given.
        value: u64,
        /// What would be accepted.
        must: String,
    },
    /// Too many, too long, or empty.
    #[error(
        "--shared-prefix: {found}; at most {SHARED_PREFIXES_MAX} are served, each of 1 to \
         {SHARED_PREFIX_BYTES_MAX} bytes"
    )]
    SharedPrefix {
        /// What is wrong.
        found: String,
    },
    /// Empty or not printable.
    #[error("--served-name must be one to 253 printable characters without spaces")]
    ServedName,
}

impl Arguments {
    /// Form and filter of the log, needed before anything can be checked aloud.
    pub fn log(&self) -> (LogFormat, &str) {
        (self.log_format, &self.log)
    }
}

impl TryFrom<Arguments> for Config {
    type Error = ConfigError;

    fn try_from(raw: Arguments) -> Result<Self, ConfigError> {
        in_range("sequences-max", raw.sequences_max as u64, 1, SEQUENCES_MAX as u64)?;
        in_range("waiting-max", raw.waiting_max as u64, 1, WAITING_MAX as u64)?;
        in_range("threads", raw.threads as u64, 0, THREADS_MAX as u64)?;
        in_range("adaskip-learn-tokens", raw.adaskip_learn_tokens.into(), 1, u32::MAX.into())?;
        if raw.tokens_per_block == 0
            || !raw.tokens_per_block.is_multiple_of(TOKENS_PER_BLOCK_MULTIPLE)
            || raw.tokens_per_block > TOKENS_PER_BLOCK_MAX
        {
            return Err(ConfigError::Range {
                flag: "tokens-per-block",
                value: raw.tokens_per_block.into(),
                must: format!(
                    "a multiple of {TOKENS_PER_BLOCK_MULTIPLE}, at most {TOKENS_PER_BLOCK_MAX}"
                ),
            });
        }
        if raw.step_tokens_max < raw.sequences_max {
            return Err(ConfigError::Range {
                flag: "step-tokens-max",
                value: raw.step_tokens_max as u64,
                must: format!(
                    "at least --sequences-max ({}), or a running sequence would starve",
                    raw.sequences_max
                ),
            });
        }
        if raw.device_bytes == 0 {
            return Err(ConfigError::Range {
                flag: "device-bytes",
                value: 0,
                must: "large enough for one block of the model".to_owned(),
            });
        }
        let prefixes = &raw.shared_prefix;
        let is_bad = |text: &&String| text.is_empty() || text.len() > SHARED_PREFIX_BYTES_MAX;
        if prefixes.len() > SHARED_PREFIXES_MAX {
            let found = format!("{} were given", prefixes.len());
            return Err(ConfigError::SharedPrefix { found });
        }
        if let Some(text) = prefixes.iter().find(is_bad) {
            let found = format!("one has {} bytes", text.len());
            return Err(ConfigError::SharedPrefix { found });
        }
        if let Some(name) = &raw.served_name
            && (name.is_empty() || name.len() > 253 || !name.chars().all(|c| c.is_ascii_graphic()))
        {
            return Err(ConfigError::ServedName);
        }
        let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Ok(Self {
            model: raw.model,
            served_name: raw.served_name,
            http: raw.http,
            cache_socket: raw.cache_socket,
            device_bytes: raw.device_bytes,
            sequences_max: raw.sequences_max,
            waiting_max: raw.waiting_max,
            context_max: NonZeroU32::new(raw.context_max),
            tokens_per_block: raw.tokens_per_block,
            step_tokens_max: raw.step_tokens_max,
            threads: NonZeroUsize::new(raw.threads).unwrap_or(cores),
            shared_prefixes: raw.shared_prefix,
            skip: SkipConfig {
                prefill_sublayers: raw.adaskip_prefill,
                decode_sublayers: raw.adaskip_decode,
                learn_tokens: raw.adaskip_learn_tokens,
                extras: raw.adaskip_extras,
                reuse: match raw.reuse {
                    ReuseArgument::Own => Reuse::Own,
                    ReuseArgument::Any => Reuse::Any,
                },
            },
            admin: raw.admin,
        })
    }
}

fn in_range(flag: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(ConfigError::Range { flag, value, must: format!("from {min} to {max}") })
}

/// `1048576`, `512Mi`, `2GiB`.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_end_matches('B') {
        "" => 0,
        "Ki" => 10,
        "Mi" => 20,
        "Gi" => 30,
        "Ti" => 40,
        _ => return Err(format!("unknown unit `{unit}`; use bytes, Ki, Mi, Gi or Ti")),
    };
    let number: u64 = number.parse().map_err(|_| "not a number of bytes".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "more than 16 EiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(flags: &[&str]) -> Result<Config, ConfigError> {
        let line = ["runtime", "--model", "/models"].iter().chain(flags);
        Config::try_from(Arguments::try_parse_from(line).unwrap())
    }

    #[test]
    fn the_defaults_are_valid() {
        let config = config(&[]).unwrap();
        assert_eq!(config.device_bytes, 512 << 20);
        assert_eq!(config.context_max, None);
        assert!(config.skip.is_off());
    }

    #[test]
    fn the_operators_command_line_is_accepted() {
        let config = config(&[
            "--served-name",
            "smollm2",
            "--http",
            "0.0.0.0:8000",
            "--cache-socket",
            "/run/kv/daemon.sock",
            "--device-bytes",
            "536870912",
            "--sequences-max",
            "8",
            "--waiting-max",
            "64",
            "--context-max",
            "8192",
            "--tokens-per-block",
            "64",
            "--step-tokens-max",
            "512",
            "--threads",
            "2",
            "--adaskip-prefill",
            "4",
            "--adaskip-decode",
            "6",
            "--adaskip-learn-tokens",
            "20",
            "--adaskip-extras",
            "true",
            "--reuse",
            "any",
            "--admin",
        ])
        .unwrap();
        assert!(config.admin);
        assert!(config.skip.extras);
        assert_eq!(config.skip.reuse, Reuse::Any);
    }

    #[test]
    fn settings_that_cannot_work_name_their_flag_and_the_way_out() {
        for (flags, flag) in [
            (&["--tokens-per-block", "24"], "--tokens-per-block"),
            (&["--step-tokens-max", "4"], "--step-tokens-max"),
            (&["--sequences-max", "0"], "--sequences-max"),
            (&["--waiting-max", "0"], "--waiting-max"),
            (&["--device-bytes", "0"], "--device-bytes"),
            (&["--served-name", "two words"], "--served-name"),
        ] {
            let message = config(flags).unwrap_err().to_string();
            assert!(message.contains(flag), "{message}");
            assert!(message.contains("must be"), "{message}");
        }
    }

    #[test]
    fn shared_prefixes_may_be_many_but_neither_empty_nor_endless() {
        let of = |texts: &[&str]| {
            let flags: Vec<String> =
                texts.iter().map(|text| format!("--shared-prefix={text}")).collect();
            config(&flags.iter().map(String::as_str).collect::<Vec<_>>())
        };
        assert_eq!(of(&["You help.", "-- so do you"]).unwrap().shared_prefixes.len(), 2);
        let long = "x".repeat(100_000);
        for bad in [vec![""], vec![long.as_str()], vec!["again"; 17]] {
            let message = of(&bad).unwrap_err().to_string();
            assert!(
                message.contains("--shared-prefix") && message.contains("at most"),
                "{message}"
            );
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes("1048576"), Ok(1 << 20));
        assert_eq!(bytes("3Gi"), bytes("3GiB"));
        assert!(bytes("3GB").is_err());
        assert!(bytes("99999999999Ti").is_err());
    }
}
