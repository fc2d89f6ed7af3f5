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
    read_pieces(bytes, &mut |piece| {
        pieces.push(piece);
        true
    })?;
    Ok(pieces)
}

/// A15.
#[test]
fn name_resolution_blocks_no_archive() {
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
    let long = format!("{{\"k/\\\"{{1\":{{\"a\":\"}}{}\"}},\"l\":[1,{{}}]}}", "x".repeat(PATCH_BYTES_MAX));
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
        assert!(error.contains("exceed the limit") || error.contains("only files"), "{kind}: {error}");
    }
    let whole = "x".repeat(MODULES_BYTES_MAX / 2 + 1);
    let modules = [("a.rego", whole.as_bytes()), ("b.rego", whole.as_bytes())];
    assert!(read(&archive(&modules)).unwrap_err().to_string().contains("b.rego"));
}

proptest! {
    /// I9: a damaged archive yields an error or the pieces before the damage.
    #[test]
    fn i9_damaged_archives_do_not_panic(offset in 0usize..400, byte: u8, raw: bool) {
        let mut bytes = archive(&[("opahub.json", b"{\"modules\":{}}"), ("a/data.json", b"{\"x\":1}")]);
        if raw {
            let mut tar = Vec::new();
            GzDecoder::new(&bytes[..]).read_to_end(&mut tar).unwrap();
            let offset = offset * 7 % tar.len();
            tar[offset] = byte;
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(&tar).unwrap();
            bytes = gzip.finish().unwrap();
        } else {
            let offset = offset % bytes.len();
            bytes[offset] = byte;
        }
        let _ = read(&bytes);
        let _ = read(&bytes[..bytes.len() / 2]);
    }
}
