//! A GGUF file, opened and checked: metadata, tensors by name, the model's shape.
//!
//! candle parses the header; tensor bytes come from a mapping of the file. A file is hostile until
//! proven otherwise: every length is checked against the file before anything is allocated for it,
//! every tensor that the model needs is looked up, with its shape and type, when the file is opened.
//!
//! Why unsafe: a file mapping. What must hold: nobody shortens the file while it is mapped, or
//! reading it ends the process with SIGBUS. Who guarantees it: model files lie on read-only volumes
//! (image volumes, read-only claims); the mapping is dropped once the weights are packed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};

use crate::model::{self, Config};

/// Bytes that metadata and tensor list may take. The largest known vocabularies need 16 MiB; parsed
/// values take up to 32 times their bytes, so this also bounds memory under a hostile file.
const HEADER_BYTES_MAX: usize = 64 << 20;

/// Magic, version, two counts.
const HEADER_BYTES_MIN: usize = 24;

/// Why a model file cannot be served. Each message names the file and says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelFileError {
    /// The file system said no.
    #[error("cannot read the model at {}: {source}; check --model", path.display())]
    Io {
        /// What was opened.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A folder without exactly one model.
    #[error(
        "{} holds {found} .gguf files, expected exactly one; name the file with --model",
        path.display()
    )]
    Folder {
        /// The folder.
        path: PathBuf,
        /// How many there are.
        found: usize,
    },
    /// Some other kind of file.
    #[error(
        "{} is not a GGUF file: it starts with {start:02x?}, expected 47 47 55 46 (\"GGUF\")",
        path.display()
    )]
    NotGguf {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        start: Vec<u8>,
    },
    /// The header does not parse: truncated or damaged.
    #[error("{} is damaged: {detail}; copy the file again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        detail: String,
    },
    /// A model that this version cannot compute.
    #[error("{} cannot be served: {detail}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is not supported, and what is.
        detail: String,
    },
}

/// What is wrong with a file, before its path is known.
#[derive(Debug)]
pub(crate) enum Problem {
    Damaged(String),
    Unsupported(String),
}

impl Problem {
    fn at(self, path: &Path) -> ModelFileError {
        let path = path.to_owned();
        match self {
            Self::Damaged(detail) => ModelFileError::Damaged { path, detail },
            Self::Unsupported(detail) => ModelFileError::Unsupported { path, detail },
        }
    }
}

/// The file's key-value pairs, read-only. An absent key and one of another type are both `None`.
#[derive(Debug)]
pub struct Metadata(BTreeMap<String, Value>);

fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::U8(v) => Some(i64::from(*v)),
        Value::I8(v) => Some(i64::from(*v)),
        Value::U16(v) => Some(i64::from(*v)),
        Value::I16(v) => Some(i64::from(*v)),
        Value::U32(v) => Some(i64::from(*v)),
        Value::I32(v) => Some(i64::from(*v)),
        Value::U64(v) => i64::try_from(*v).ok(),
        Value::I64(v) => Some(*v),
        _ => None,
    }
}

impl Metadata {
    /// A string.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.0.get(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// An integer of any width.
    pub fn i64(&self, key: &str) -> Option<i64> {
        integer(self.0.get(key)?)
    }

    /// A float of either width.
    pub fn f64(&self, key: &str) -> Option<f64> {
        match self.0.get(key)? {
            Value::F32(v) => Some(f64::from(*v)),
            Value::F64(v) => Some(*v),
            _ => None,
        }
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.0.get(key)? {
            Value::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// A list of strings.
    pub fn strings(&self, key: &str) -> Option<Vec<&str>> {
        fn text(value: &Value) -> Option<&str> {
            match value {
                Value::String(text) => Some(text),
                _ => None,
            }
        }
        match self.0.get(key)? {
            Value::Array(values) => values.iter().map(text).collect(),
            _ => None,
        }
    }

    /// A list of integers.
    pub fn i64s(&self, key: &str) -> Option<Vec<i64>> {
        match self.0.get(key)? {
            Value::Array(values) => values.iter().map(integer).collect(),
            _ => None,
        }
    }

    /// Whether the key exists, whatever its type.
    pub fn contains(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }
}

#[derive(Debug)]
struct Entry {
    dtype: GgmlDType,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A tensor in the mapped file.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// How values are stored.
    pub dtype: GgmlDType,
    /// Outermost first; a matrix is `[rows, columns]`.
    pub shape: &'a [usize],
    /// As stored.
    pub bytes: &'a [u8],
}

impl Tensor<'_> {
    /// The values of a tensor of floats; `None` for another type.
    pub fn floats(&self) -> Option<Vec<f32>> {
        let (values, rest) = self.bytes.as_chunks::<4>();
        (self.dtype == GgmlDType::F32 && rest.is_empty())
            .then(|| values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

/// An open model file whose needed tensors are all there.
#[derive(Debug)]
pub struct Model {
    path: PathBuf,
    map: memmap2::Mmap,
    metadata: Metadata,
    tensors: BTreeMap<String, Entry>,
    config: Config,
}

impl Model {
    /// Opens a `.gguf`, or a folder that holds exactly one.
    pub fn open(path: &Path) -> Result<Self, ModelFileError> {
        let path = find_file(path)?;
        let io = |source| ModelFileError::Io { path: path.clone(), source };
        let file = std::fs::File::open(&path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length == 0 {
            return Err(ModelFileError::NotGguf { path, start: Vec::new() });
        }
        // SAFETY: the file is not shortened while mapped (module doc).
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        if !map.starts_with(b"GGUF") {
            let start = map[..map.len().min(4)].to_vec();
            return Err(ModelFileError::NotGguf { path, start });
        }
        let (metadata, tensors) = read_header(&map).map_err(|problem| problem.at(&path))?;
        let config = Config::from_metadata(&metadata, |name| tensors.contains_key(name))
            .map_err(|problem| problem.at(&path))?;
        let model = Self { path, map, metadata, tensors, config };
        model::check_tensors(&model).map_err(|problem| problem.at(&model.path))?;
        Ok(model)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its key-value pairs.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let entry = self.tensors.get(name)?;
        let bytes = &self.map[entry.bytes.clone()];
        Some(Tensor { dtype: entry.dtype, shape: &entry.shape, bytes })
    }

    /// Names of all tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
}

fn find_file(path: &Path) -> Result<PathBuf, ModelFileError> {
    let io = |source| ModelFileError::Io { path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(io)?.is_dir() {
        return Ok(path.to_owned());
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)? {
        let file = entry.map_err(io)?.path();
        if file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            files.push(file);
        }
    }
    match <[PathBuf; 1]>::try_from(files) {
        Ok([file]) => Ok(file),
        Err(files) => Err(ModelFileError::Folder { path: path.to_owned(), found: files.len() }),
    }
}

type Header = (Metadata, BTreeMap<String, Entry>);

fn read_header(map: &[u8]) -> Result<Header, Problem> {
    if map.len() < HEADER_BYTES_MIN {
        return Err(Problem::Damaged(format!(
            "it ends after {} bytes, within the header",
            map.len()
        )));
    }
    let header = &map[..map.len().min(HEADER_BYTES_MAX)];
    refuse_zero_alignment(header)?;
    let content = Content::read(&mut std::io::Cursor::new(header)).map_err(|error| {
        Problem::Damaged(format!("its header does not parse ({})", brief(&error)))
    })?;
    let data_start = usize::try_from(content.tensor_data_offset).unwrap_or(usize::MAX);
    let mut tensors = BTreeMap::new();
    for (name, info) in content.tensor_infos {
        let shape = info.shape.dims().to_vec();
        let block = info.ggml_dtype.block_size();
        let values = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
        let bytes = values
            .filter(|values| values.is_multiple_of(block))
            .and_then(|values| (values / block).checked_mul(info.ggml_dtype.type_size()))
            .ok_or_else(|| Problem::Damaged(format!("tensor {name} has the shape {shape:?}")))?;
        let range = usize::try_from(info.offset)
            .ok()
            .and_then(|offset| data_start.checked_add(offset))
            .and_then(|start| Some(start..start.checked_add(bytes)?))
            .filter(|range| range.end <= map.len());
        let bytes = range.ok_or_else(|| {
            Problem::Damaged(format!(
                "tensor {name} needs {bytes} bytes from {} of its data, but the file has {} bytes \
                 in all",
                info.offset,
                map.len()
            ))
        })?;
        tensors.insert(name, Entry { dtype: info.ggml_dtype, shape, bytes });
    }
    Ok((Metadata(content.metadata.into_iter().collect()), tensors))
}

/// The first line: candle appends a backtrace where one is asked for.
fn brief(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// candle divides by `general.alignment`; a file that says 0 must not get that far.
fn refuse_zero_alignment(header: &[u8]) -> Result<(), Problem> {
    const KEY: &[u8] = b"general.alignment";
    const TYPE_BYTES: usize = 4;
    let mut rest = header;
    while let Some(at) = rest.windows(KEY.len()).position(|window| window == KEY) {
        rest = &rest[at + KEY.len()..];
        let Some((value_type, value)) = rest.split_at_checked(TYPE_BYTES) else { break };
        let width = match value_type[0] {
            0 | 1 => 1,
            2 | 3 => 2,
            _ => 4,
        };
        if value.iter().take(width).all(|&byte| byte == 0) {
            return Err(Problem::Damaged("its general.alignment is 0".to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Model, ModelFileError};
    use crate::weights::random::write_tiny_gguf;

    fn tiny() -> (tempfile::TempDir, std::path::PathBuf, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        write_tiny_gguf(&path, 1).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        (folder, path, bytes)
    }

    #[test]
    fn a_folder_with_one_model_is_that_model() {
        let (folder, path, _) = tiny();
        assert_eq!(Model::open(folder.path()).unwrap().path(), path);
        std::fs::copy(&path, folder.path().join("second.gguf")).unwrap();
        let refused = Model::open(folder.path()).unwrap_err();
        assert!(matches!(refused, ModelFileError::Folder { found: 2, .. }), "{refused}");
    }

    #[test]
    fn a_foreign_file_is_named_as_such() {
        let (_folder, path, _) = tiny();
        for bytes in [&b""[..], b"GG", b"PK\x03\x04 a zip archive, not a model"] {
            std::fs::write(&path, bytes).unwrap();
            let refused = Model::open(&path).unwrap_err();
            assert!(matches!(refused, ModelFileError::NotGguf { .. }), "{refused}");
        }
        let refused = Model::open(&path.with_extension("absent")).unwrap_err();
        assert!(matches!(refused, ModelFileError::Io { .. }), "{refused}");
    }

    #[test]
    fn a_file_cut_anywhere_is_refused_without_a_panic() {
        let (_folder, path, bytes) = tiny();
        let header_cuts = (4..bytes.len().min(3000)).step_by(7);
        let data_cuts = (3000..bytes.len()).step_by(4999);
        for cut in header_cuts.chain(data_cuts).chain([bytes.len() - 33]) {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let refused = Model::open(&path).expect_err(&format!("cut at {cut}"));
            assert!(matches!(refused, ModelFileError::Damaged { .. }), "{cut}: {refused}");
        }
    }

    #[test]
    fn flipped_header_bytes_never_panic() {
        let (_folder, path, bytes) = tiny();
        for at in (4..bytes.len().min(2500)).step_by(5) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0xFF;
            std::fs::write(&path, &bytes).unwrap();
            drop(Model::open(&path)); // Either answer is right: the byte may lie in a free text.
        }
    }

    #[test]
    fn an_alignment_of_zero_is_refused() {
        let (_folder, path, bytes) = tiny();
        let mut hostile = bytes[..16].to_vec();
        let pairs = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) + 1;
        hostile.extend(pairs.to_le_bytes());
        hostile.extend(17_u64.to_le_bytes());
        hostile.extend(b"general.alignment");
        hostile.extend(4_u32.to_le_bytes());
        hostile.extend(0_u32.to_le_bytes());
        hostile.extend(&bytes[24..]);
        std::fs::write(&path, hostile).unwrap();
        let refused = Model::open(&path).unwrap_err();
        assert!(refused.to_string().contains("general.alignment is 0"), "{refused}");
    }

    #[test]
    fn an_unknown_architecture_is_refused_by_name() {
        let (_folder, path, mut bytes) = tiny();
        let at = bytes.windows(5).position(|window| window == b"llama").unwrap();
        bytes[at..at + 5].copy_from_slice(b"mamba");
        std::fs::write(&path, bytes).unwrap();
        let refused = Model::open(&path).unwrap_err();
        assert!(refused.to_string().contains("mamba"), "{refused}");
    }
}
