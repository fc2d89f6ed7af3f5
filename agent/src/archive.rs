//! Reads an archive from the hub piece by piece: gzip'd tar in, directories and modules out, never more in memory than
//! the head, a module, an entry, or a directory that fits into a PATCH.

use std::io::{self, BufRead, BufReader, Read};

use bytes::{Buf, Bytes};
use flate2::read::GzDecoder;
use opa_hub_proto::head::{ENTRY_BYTES_MAX, HEAD_BYTES_MAX, HEAD_FILE, Head, MODULES_BYTES_MAX};
use opa_hub_proto::manifest::{DATA_FILE, module_id};
use opa_hub_proto::path::DirPath;
use tokio::sync::mpsc;

use crate::config::{DECODED_AHEAD_MAX, PATCH_BYTES_MAX};

/// Maximum bytes of a name in an archive, as of a path on Linux: namespace, ConfigMap and key have 570 at most.
const NAME_BYTES_MAX: usize = 4 << 10;

/// What an archive is made of, in this order: a head, modules, directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// What the receiver holds when all is applied.
    Head(Head),
    /// A module.
    Module {
        /// Its id.
        id: String,
        /// Its text.
        text: String,
    },
    /// A directory that fits into a PATCH, as a JSON object.
    Directory(DirPath, Vec<u8>),
    /// A larger directory begins.
    Begin(DirPath),
    /// One of its entries: the key, and the value as JSON.
    Entry(String, Vec<u8>),
    /// It is complete.
    End,
}

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The download broke off, or is no gzip'd tar.
    #[error("the archive broke off or is damaged: {0}")]
    Read(#[from] io::Error),
    /// A file whose content is not what its name promises.
    #[error("{file} in the archive: {problem}")]
    Content {
        /// The file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Bytes as they come from the network.
pub type Chunks = mpsc::Receiver<io::Result<Bytes>>;

/// Starts reading `chunks` on a thread of its own, beside the runtime's few for names of hosts: neither waits for the
/// other. The receiver gets pieces until the archive ends or fails. The thread ends with `chunks` or the receiver.
pub fn read(chunks: Chunks) -> Result<mpsc::Receiver<Result<Piece, Error>>, Error> {
    let (out, pieces) = mpsc::channel(DECODED_AHEAD_MAX);
    let run = move || {
        let reader = ChunkReader { chunks, current: Bytes::new() };
        if let Err(error) = pieces_of(reader, &mut |piece| out.blocking_send(Ok(piece)).is_ok()) {
            _ = out.blocking_send(Err(error));
        }
    };
    std::thread::Builder::new().name("archive".into()).spawn(run)?;
    Ok(pieces)
}

/// Reads an archive, giving its pieces to `take` until it wants no more.
pub fn pieces_of(reader: impl Read, take: &mut dyn FnMut(Piece) -> bool) -> Result<(), Error> {
    let mut archive = tar::Archive::new(GzDecoder::new(reader));
    let mut modules_bytes: usize = 0;
    let mut long_name = None;
    // Raw: `tar` by itself reads long names and extensions whole, however large they are.
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() {
            let size = usize::try_from(entry.size()).unwrap_or(usize::MAX);
            long_name = Some(whole(&mut entry, size, NAME_BYTES_MAX)?);
            continue;
        }
        let name = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
        let file = String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(&name)).into_owned();
        let wrong = |problem: &dyn std::fmt::Display| Error::Content {
            file: file.clone(),
            problem: problem.to_string(),
        };
        if !kind.is_file() {
            return Err(wrong(&"the hub sends files only"));
        }
        let size = usize::try_from(entry.size()).map_err(|error| wrong(&error))?;
        let goes_on = if file == HEAD_FILE {
            let json = whole(&mut entry, size, HEAD_BYTES_MAX).map_err(|error| wrong(&error))?;
            take(Piece::Head(serde_json::from_slice(&json).map_err(|error| wrong(&error))?))
        } else if let Some(id) = module_id(&file) {
            let text = whole(&mut entry, size, MODULES_BYTES_MAX.saturating_sub(modules_bytes));
            modules_bytes = modules_bytes.saturating_add(size);
            let text =
                String::from_utf8(text.map_err(|error| wrong(&error))?).map_err(|error| wrong(&error))?;
            take(Piece::Module { id: id.to_owned(), text })
        } else if let Some(dir) = file.strip_suffix(DATA_FILE).and_then(|dir| dir.strip_suffix('/')) {
            let dir: DirPath = format!("/{dir}").parse().map_err(|error| wrong(&error))?;
            directory(&mut entry, dir, size, take).map_err(|error| wrong(&error))?
        } else {
            true
        };
        if !goes_on {
            return Ok(());
        }
    }
    Ok(())
}

fn directory(
    entry: &mut dyn Read,
    dir: DirPath,
    size: usize,
    take: &mut dyn FnMut(Piece) -> bool,
) -> io::Result<bool> {
    if size <= PATCH_BYTES_MAX {
        let json = whole(entry, size, PATCH_BYTES_MAX)?;
        // Spliced into a patch unparsed: what is no object would break the patch around it.
        return match serde_json::from_slice::<serde::de::IgnoredAny>(&json) {
            Ok(_) if json.starts_with(b"{") => Ok(take(Piece::Directory(dir, json))),
            _ => Err(invalid("not a JSON object")),
        };
    }
    if !take(Piece::Begin(dir)) {
        return Ok(false);
    }
    let mut members = Members { reader: BufReader::new(entry), first: true };
    while let Some((key, value)) = members.next()? {
        if !take(Piece::Entry(key, value)) {
            return Ok(false);
        }
    }
    Ok(take(Piece::End))
}

fn whole(entry: &mut dyn Read, size: usize, max: usize) -> io::Result<Vec<u8>> {
    if size > max {
        return Err(invalid(&format!("{size} bytes are more than the {max} that it may have")));
    }
    let mut content = Vec::with_capacity(size);
    entry.read_to_end(&mut content)?;
    Ok(content)
}

fn invalid(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

/// The members of a JSON object, one after the other.
struct Members<R> {
    reader: BufReader<R>,
    first: bool,
}

impl<R: Read> Members<R> {
    fn next(&mut self) -> io::Result<Option<(String, Vec<u8>)>> {
        if std::mem::take(&mut self.first) {
            self.expect(b'{')?;
            if self.peek()? == b'}' {
                return Ok(None);
            }
        } else if self.byte()? == b'}' {
            return Ok(None);
        }
        let key = self.value(b":")?;
        let key = serde_json::from_slice(&key).map_err(|_| invalid("a key that is no text"))?;
        self.expect(b':')?;
        let value = self.value(b",}")?;
        serde_json::from_slice::<serde::de::IgnoredAny>(&value)
            .map_err(|_| invalid("a value that is no JSON"))?;
        Ok(Some((key, value)))
    }

    /// Bytes up to one of `ends` that stands outside all texts and brackets.
    fn value(&mut self, ends: &[u8]) -> io::Result<Vec<u8>> {
        let mut value = Vec::new();
        let (mut depth, mut in_text, mut escaped) = (0u32, false, false);
        loop {
            let buffer = self.reader.fill_buf()?;
            if buffer.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let end = buffer.iter().position(|byte| {
                if in_text {
                    match byte {
                        _ if escaped => escaped = false,
                        b'\\' => escaped = true,
                        b'"' => in_text = false,
                        _ => {}
                    }
                    return false;
                }
                if depth == 0 && ends.contains(byte) {
                    return true;
                }
                match byte {
                    b'"' => in_text = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                false
            });
            let taken = end.unwrap_or(buffer.len());
            value.extend_from_slice(&buffer[..taken]);
            self.reader.consume(taken);
            if value.len() > ENTRY_BYTES_MAX {
                return Err(invalid("an entry that is too large"));
            }
            if end.is_some() {
                return Ok(value);
            }
        }
    }

    fn expect(&mut self, expected: u8) -> io::Result<()> {
        if self.byte()? == expected { Ok(()) } else { Err(invalid("not a JSON object")) }
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
        let taken = out.len().min(self.current.len());
        self.current.copy_to_slice(&mut out[..taken]);
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut tar = tar::Builder::new(gzip);
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, path, *content).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<Vec<Piece>, Error> {
        let mut pieces = Vec::new();
        pieces_of(bytes, &mut |piece| {
            pieces.push(piece);
            true
        })?;
        Ok(pieces)
    }

    /// A15.
    #[test]
    fn threads_that_resolve_names_keep_no_archive() {
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        let (end, blocked) = std::sync::mpsc::channel::<()>();
        let pieces = runtime.block_on(async {
            drop(tokio::task::spawn_blocking(move || blocked.recv()));
            let (out, chunks) = mpsc::channel(1);
            let mut pieces = super::read(chunks).unwrap();
            out.send(Ok(archive(&[("opahub.json", b"{}")]).into())).await.unwrap();
            drop(out);
            pieces.recv().await
        });
        assert_eq!(pieces.unwrap().unwrap(), Piece::Head(Head::default()));
        drop(end);
    }

    #[test]
    fn reads_heads_modules_and_directories() {
        let long =
            format!("{{\"k/\\\"{{1\":{{\"a\":\"}}{}\"}},\"l\":[1,{{}}]}}", "x".repeat(PATCH_BYTES_MAX));
        let files: &[(&str, &[u8])] = &[
            ("opahub.json", b"{}"),
            (".manifest", b"{}"),
            ("a/b/c.rego", b"package c"),
            ("a/b/d/module.rego", b"package d"),
            ("a/b/data.json", b"{\"x\":1}"),
            ("a/c/data.json", long.as_bytes()),
        ];
        let value = format!("{{\"a\":\"}}{}\"}}", "x".repeat(PATCH_BYTES_MAX));
        let expected = [
            Piece::Head(Head::default()),
            Piece::Module { id: "a/b/c.rego".into(), text: "package c".into() },
            Piece::Module { id: "a/b/d".into(), text: "package d".into() },
            Piece::Directory("/a/b".parse().unwrap(), b"{\"x\":1}".to_vec()),
            Piece::Begin("/a/c".parse().unwrap()),
            Piece::Entry("k/\"{1".into(), value.into_bytes()),
            Piece::Entry("l".into(), b"[1,{}]".to_vec()),
            Piece::End,
        ];
        assert_eq!(read(&archive(files)).unwrap(), expected);
    }

    #[test]
    fn i9_refuses_what_would_break_a_patch() {
        for (file, content) in
            [("opahub.json", "1"), ("a/data.json", "[1]"), ("a/data.json", "{}, {}"), ("a b/data.json", "{}")]
        {
            let result = read(&archive(&[(file, content.as_bytes())]));
            assert!(result.is_err(), "{file} {content}");
        }
        let big = |json: &str| json.replace('$', &"x".repeat(PATCH_BYTES_MAX));
        for content in ["{\"$\":1", "{\"$\" 1}", "[\"$\"]", "{\"$\":}", "{$:1}", "{\"a\":\"$\"]}"] {
            assert!(read(&archive(&[("a/data.json", big(content).as_bytes())])).is_err(), "{content}");
        }
        let huge = format!("{{\"a\":\"{}\"}}", "x".repeat(ENTRY_BYTES_MAX));
        assert!(read(&archive(&[("a/data.json", huge.as_bytes())])).is_err());
    }

    #[test]
    fn i9_headers_are_bounded() {
        let name = |bytes: usize| format!("{}/data.json", "n".repeat(bytes));
        assert_eq!(read(&archive(&[(&name(200), b"{}")])).unwrap().len(), 1);
        assert!(read(&archive(&[(&name(NAME_BYTES_MAX), b"{}")])).is_err());
        for kind in [b'L', b'K', b'x', b'g', b'S'] {
            let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            let mut tar = tar::Builder::new(gzip);
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::new(kind));
            header.set_size(1 << 40);
            header.set_cksum();
            tar.append(&header, std::io::empty()).unwrap();
            let bytes = tar.into_inner().unwrap().finish().unwrap();
            let error = read(&bytes).unwrap_err().to_string();
            assert!(error.contains("may have") || error.contains("files only"), "{kind}: {error}");
        }
        let whole = "x".repeat(MODULES_BYTES_MAX / 2 + 1);
        let modules = [("a.rego", whole.as_bytes()), ("b.rego", whole.as_bytes())];
        assert!(read(&archive(&modules)).unwrap_err().to_string().contains("b.rego"));
    }

    proptest! {
        /// I9: a damaged or cut archive is an error, or what was read before the damage.
        #[test]
        fn i9_damaged_archives_do_not_panic(at in 0usize..400, byte: u8, raw: bool) {
            let mut bytes = archive(&[("opahub.json", b"{\"modules\":{}}"), ("a/data.json", b"{\"x\":1}")]);
            if raw {
                let mut tar = Vec::new();
                GzDecoder::new(&bytes[..]).read_to_end(&mut tar).unwrap();
                let at = at * 7 % tar.len();
                tar[at] = byte;
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(&tar).unwrap();
                bytes = gzip.finish().unwrap();
            } else {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            let _ = read(&bytes);
            let _ = read(&bytes[..bytes.len() / 2]);
        }
    }
}
