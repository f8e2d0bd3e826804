//! Traces: turns of conversations, one JSON object a line (`docs/trace-format.md`).

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Version written and read.
pub const VERSION: u32 = 1;

/// Why a trace is not one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The file.
    #[error("trace: {0}")]
    Io(#[from] std::io::Error),
    /// A line that is not what the format says.
    #[error("trace, line {line}: {message}")]
    Line {
        /// From 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
}

/// Opens a file; one that ends in `.xz` is unpacked on the way.
pub fn open(path: &Path) -> std::io::Result<Box<dyn BufRead>> {
    let file = BufReader::new(File::open(path)?);
    if path.extension().is_some_and(|extension| extension == "xz") {
        return Ok(Box::new(BufReader::new(lzma_rust2::XzReader::new(file, true))));
    }
    Ok(Box::new(file))
}

/// First line of a trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`VERSION`].
    pub colloquy_trace: u32,
    /// Where it comes from.
    pub name: String,
    /// Tokens of a block.
    pub block_tokens: u32,
}

/// When a turn is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// Milliseconds from the trace's start, but not before the conversation's last answer.
    AtMs(u64),
    /// Milliseconds after the conversation's last answer.
    AfterMs(u64),
}

/// One turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceTurn {
    /// Number of its conversation.
    pub conversation: u32,
    /// Number of its tenant, the same for all turns of a conversation.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tenant: u32,
    /// When it is asked for.
    #[serde(flatten)]
    pub when: When,
    /// Tokens of history dropped from the front before it: the context was full.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cut: u32,
    /// Tokens of the prompt that are not history.
    pub new: u32,
    /// Tokens generated.
    pub answer: u32,
    /// Ids of the prompt's blocks, each for the block and all before it. Without it the history is what
    /// the conversation's earlier turns left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Vec<u64>>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// See the module. Turns of one conversation are in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// First line.
    pub header: Header,
    /// The others.
    pub turns: Vec<TraceTurn>,
}

impl Trace {
    /// A trace of this version.
    pub fn new(name: &str, block_tokens: u32, turns: Vec<TraceTurn>) -> Self {
        let header = Header { colloquy_trace: VERSION, name: name.into(), block_tokens };
        Self { header, turns }
    }

    /// Reads a trace; every line is checked.
    pub fn read(reader: impl BufRead) -> Result<Self, TraceError> {
        let mut lines = (1..).zip(reader.lines());
        let (_, first) = lines.next().ok_or_else(|| wrong(1, &"the header is missing"))?;
        let header: Header = serde_json::from_str(&first?).map_err(|error| wrong(1, &error))?;
        if header.colloquy_trace != VERSION {
            let version = header.colloquy_trace;
            return Err(wrong(1, &format!("version {version}, this program reads {VERSION}")));
        }
        if header.block_tokens == 0 {
            return Err(wrong(1, &"block_tokens is 0"));
        }
        let mut turns = Vec::new();
        for (number, line) in lines {
            let line = line?;
            if !line.trim().is_empty() {
                turns.push(serde_json::from_str(&line).map_err(|error| wrong(number, &error))?);
            }
        }
        Ok(Self { header, turns })
    }

    /// Writes what [`Trace::read`] reads.
    pub fn write(&self, mut writer: impl Write) -> Result<(), TraceError> {
        let as_io = |error: serde_json::Error| TraceError::Io(error.into());
        serde_json::to_writer(&mut writer, &self.header).map_err(as_io)?;
        writer.write_all(b"\n")?;
        for turn in &self.turns {
            serde_json::to_writer(&mut writer, turn).map_err(as_io)?;
            writer.write_all(b"\n")?;
        }
        Ok(writer.flush()?)
    }

    /// BLAKE3 of what [`Trace::write`] writes.
    pub fn digest(&self) -> Result<String, TraceError> {
        let mut hasher = blake3::Hasher::new();
        self.write(&mut hasher)?;
        Ok(hasher.finalize().to_hex().to_string())
    }
}

fn wrong(line: usize, message: &impl ToString) -> TraceError {
    TraceError::Line { line, message: message.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let turn = |when, blocks| TraceTurn {
            conversation: 3,
            tenant: 1,
            when,
            cut: 64,
            new: 10,
            answer: 20,
            blocks,
        };
        let turns = vec![turn(When::AtMs(5), None), turn(When::AfterMs(7), Some(vec![1, 2]))];
        let trace = Trace::new("test", 64, turns);
        let mut bytes = Vec::new();
        trace.write(&mut bytes).unwrap();
        assert_eq!(Trace::read(&bytes[..]).unwrap(), trace);
    }

    #[test]
    fn a_bad_line_is_named() {
        let text =
            "{\"colloquy_trace\":1,\"name\":\"x\",\"block_tokens\":64}\n{\"conversation\":1}\n";
        let error = Trace::read(text.as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with("trace, line 2: "), "{error}");
        assert!(Trace::read(&b""[..]).is_err());
        let newer = text.replace("trace\":1", "trace\":9");
        assert!(Trace::read(newer.as_bytes()).unwrap_err().to_string().contains("version 9"));
    }

    proptest::proptest! {
        #[test]
        fn a_spoilt_trace_is_an_error_or_a_trace(
            at: usize,
            splice in "[-0-9a-z{}\\[\\],:\"\n\\\\]{0,12}",
        ) {
            let turn = |when| TraceTurn {
                conversation: 3, tenant: 1, when, cut: 64, new: 10, answer: 20, blocks: Some(vec![1, 2]),
            };
            let trace = Trace::new("test", 64, vec![turn(When::AtMs(5)), turn(When::AfterMs(7))]);
            let mut bytes = Vec::new();
            trace.write(&mut bytes).unwrap();
            let at = at % bytes.len();
            bytes.splice(at..(at + splice.len()).min(bytes.len()), splice.bytes());
            if let Ok(trace) = Trace::read(&bytes[..]) {
                let mut again = Vec::new();
                trace.write(&mut again).unwrap();
                proptest::prop_assert_eq!(Trace::read(&again[..]).unwrap(), trace);
            }
        }
    }
}
