//! Streaming reader of archives.
//!
//! Buffers at most the header, a module, an entry, or a directory that fits into a PATCH.

use std::io::{self, BufRead, BufReader, Read};

use bytes::{Buf, Bytes};
use flate2::read::GzDecoder;
use opa_hub_proto::head::{ENTRY_BYTES_MAX, HEAD_BYTES_MAX, HEAD_FILE, Head, MODULES_BYTES_MAX};
use opa_hub_proto::manifest::{DATA_FILE, module_id};
use opa_hub_proto::path::DirPath;
use tokio::sync::mpsc;

/// Maximum bytes that OPA decodes at once and the agent buffers. Larger operations are alone in a PATCH.
pub(crate) const PATCH_BYTES_MAX: usize = 256 << 10;
/// Maximum number of decoded pieces.
pub(crate) const DECODED_AHEAD_MAX: usize = 2;
/// Limit of Linux paths; namespace, ConfigMap and key need 570.
const NAME_BYTES_MAX: usize = 4 << 10;

/// Part of an archive, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Description of the content.
    Head(Head),
    /// One module.
    Module {
        /// Id.
        id: String,
        /// Source.
        text: String,
    },
    /// Directory as a JSON object.
    Directory(DirPath, Vec<u8>),
    /// Start of a directory that is too large for a PATCH.
    Begin(DirPath),
    /// Key and JSON value.
    Entry(String, Vec<u8>),
    /// End of the directory.
    End,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("reading the archive failed: {0}")]
    Read(#[from] io::Error),
    #[error("the archive is invalid: {file}: {problem}")]
    Content { file: String, problem: String },
}

pub(crate) type Chunks = mpsc::Receiver<io::Result<Bytes>>;

/// Policies for OPA.
#[derive(Clone, Debug)]
pub(crate) struct PolicyBundle {
    /// Digest of the modules.
    pub(crate) etag: String,
    /// Gzip'd tar.
    pub(crate) archive: Bytes,
}

/// Reads on a thread of its own: name resolution must not block archives.
pub(crate) fn read(chunks: Chunks) -> Result<mpsc::Receiver<Result<Piece, Error>>, Error> {
    let (out, pieces) = mpsc::channel(DECODED_AHEAD_MAX);
    let run = move || {
        let reader = ChunkReader { chunks, current: Bytes::new() };
        if let Err(error) = read_pieces(reader, &mut |piece| out.blocking_send(Ok(piece)).is_ok()) {
            _ = out.blocking_send(Err(error));
        }
    };
    std::thread::Builder::new().name("archive".into()).spawn(run)?;
    Ok(pieces)
}

/// Stops when `emit` returns `false`.
fn read_pieces(reader: impl Read, emit: &mut dyn FnMut(Piece) -> bool) -> Result<(), Error> {
    let mut archive = tar::Archive::new(GzDecoder::new(reader));
    let mut modules_bytes: usize = 0;
    let mut long_name = None;
    // `tar` reads long names and extensions without a limit.
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() {
            let size = usize::try_from(entry.size()).unwrap_or(usize::MAX);
            long_name = Some(read_file(&mut entry, size, NAME_BYTES_MAX)?);
            continue;
        }
        let name = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
        let file = String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(&name)).into_owned();
        let invalid = |problem: &dyn std::fmt::Display| Error::Content {
            file: file.clone(),
            problem: problem.to_string(),
        };
        if !kind.is_file() {
            return Err(invalid(&"only files are allowed"));
        }
        let size = usize::try_from(entry.size()).map_err(|error| invalid(&error))?;
        let wants_more = if file == HEAD_FILE {
            let json = read_file(&mut entry, size, HEAD_BYTES_MAX).map_err(|error| invalid(&error))?;
            emit(Piece::Head(serde_json::from_slice(&json).map_err(|error| invalid(&error))?))
        } else if let Some(id) = module_id(&file) {
            let text = read_file(&mut entry, size, MODULES_BYTES_MAX.saturating_sub(modules_bytes));
            modules_bytes = modules_bytes.saturating_add(size);
            let text =
                String::from_utf8(text.map_err(|error| invalid(&error))?).map_err(|error| invalid(&error))?;
            emit(Piece::Module { id: id.to_owned(), text })
        } else if let Some(dir) = file.strip_suffix(DATA_FILE).and_then(|dir| dir.strip_suffix('/')) {
            let dir: DirPath = format!("/{dir}").parse().map_err(|error| invalid(&error))?;
            read_directory(&mut entry, dir, size, emit).map_err(|error| invalid(&error))?
        } else {
            true
        };
        if !wants_more {
            return Ok(());
        }
    }
    Ok(())
}

fn read_directory(
    entry: &mut dyn Read,
    dir: DirPath,
    size: usize,
    emit: &mut dyn FnMut(Piece) -> bool,
) -> io::Result<bool> {
    if size <= PATCH_BYTES_MAX {
        let json = read_file(entry, size, PATCH_BYTES_MAX)?;
        // Anything but an object would break the patch around.
        return match serde_json::from_slice::<serde::de::IgnoredAny>(&json) {
            Ok(_) if json.starts_with(b"{") => Ok(emit(Piece::Directory(dir, json))),
            _ => Err(invalid_data("not a JSON object")),
        };
    }
    if !emit(Piece::Begin(dir)) {
        return Ok(false);
    }
    let mut members = ObjectReader { reader: BufReader::new(entry), is_first: true };
    while let Some((key, value)) = members.next()? {
        if !emit(Piece::Entry(key, value)) {
            return Ok(false);
        }
    }
    Ok(emit(Piece::End))
}

fn read_file(entry: &mut dyn Read, size: usize, max: usize) -> io::Result<Vec<u8>> {
    if size > max {
        return Err(invalid_data(&format!("{size} bytes exceed the limit of {max}")));
    }
    let mut content = Vec::with_capacity(size);
    entry.read_to_end(&mut content)?;
    Ok(content)
}

fn invalid_data(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

struct ObjectReader<R> {
    reader: BufReader<R>,
    is_first: bool,
}

impl<R: Read> ObjectReader<R> {
    fn next(&mut self) -> io::Result<Option<(String, Vec<u8>)>> {
        if std::mem::take(&mut self.is_first) {
            self.expect(b'{')?;
            if self.peek()? == b'}' {
                return Ok(None);
            }
        } else if self.byte()? == b'}' {
            return Ok(None);
        }
        let key = self.value(b":")?;
        let key = serde_json::from_slice(&key).map_err(|_| invalid_data("a key is not a string"))?;
        self.expect(b':')?;
        let value = self.value(b",}")?;
        serde_json::from_slice::<serde::de::IgnoredAny>(&value)
            .map_err(|_| invalid_data("a value is not JSON"))?;
        Ok(Some((key, value)))
    }

    /// Reads up to one of `ends` outside strings and brackets.
    fn value(&mut self, ends: &[u8]) -> io::Result<Vec<u8>> {
        let mut value = Vec::new();
        let (mut depth, mut in_string, mut is_escaped) = (0u32, false, false);
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let end = buffer.iter().position(|byte| {
                if in_string {
                    match byte {
                        _ if is_escaped => is_escaped = false,
                        b'\\' => is_escaped = true,
                        b'"' => in_string = false,
                        _ => {}
                    }
                    return false;
                }
                if depth == 0 && ends.contains(byte) {
                    return true;
                }
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                false
            });
            let len = end.unwrap_or(buffer.len());
            value.extend_from_slice(&buffer[..len]);
            self.reader.consume(len);
            if value.len() > ENTRY_BYTES_MAX {
                return Err(invalid_data("an entry is too large"));
            }
            if end.is_some() {
                return Ok(value);
            }
        }
    }

    fn expect(&mut self, expected: u8) -> io::Result<()> {
        if self.byte()? == expected { Ok(()) } else { Err(invalid_data("not a JSON object")) }
    }

    fn byte(&mut self) -> io::Result<u8> {
        let byte = self.peek()?;
        self.reader.consume(1);
        Ok(byte)
    }

    fn peek(&mut self) -> io::Result<u8> {
        self.reader.fill_buf()?.first().copied().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

struct ChunkReader {
    chunks: Chunks,
    current: Bytes,
}

impl Read for ChunkReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                None => return Ok(0),
                Some(chunk) => self.current = chunk?,
            }
        }
        let len = out.len().min(self.current.len());
        self.current.copy_to_slice(&mut out[..len]);
        Ok(len)
    }
}

#[cfg(test)]
mod tests;
