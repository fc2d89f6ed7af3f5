use std::path::Path;

use opa_hub_proto::head::{DataHead, Head};
use opa_hub_proto::position::Position;
use opa_hub_proto::revision::{Digest, Revision};
use serde_json::{Value, json};

use super::*;
use crate::archive::PATCH_BYTES_MAX;

fn meta(seed: u8) -> Meta {
    let digest = Digest::of(&[seed]);
    Meta {
        revision: Revision { modules: digest, data: digest },
        position: Position::default(),
        ensure: vec!["/pods".parse().unwrap()],
        rego_version: None,
        field_mask: None,
        etag: None,
    }
}

fn head(dirs: &[(&str, u8)], modules: &[(&str, &str)]) -> Piece {
    let dirs = dirs.iter().map(|(dir, seed)| (dir.parse().unwrap(), Digest::of(&[*seed]))).collect();
    let modules = modules.iter().map(|(id, text)| ((*id).to_owned(), Digest::of(text.as_bytes())));
    Piece::Head(Head {
        data: Some(DataHead { dirs, ensure: Vec::new() }),
        modules: Some(modules.collect()),
        ..Head::default()
    })
}

fn directory(dir: &str, json: &Value) -> Piece {
    Piece::Directory(dir.parse().unwrap(), json.to_string().into())
}

fn module(id: &str, text: &str) -> Piece {
    Piece::Module { id: id.into(), text: text.into() }
}

fn open(dir: &Path) -> StateStore {
    StateStore::open(dir.to_owned(), "main", None).unwrap()
}

/// A hanging disk does not delay OPA.
#[tokio::test(start_paused = true)]
async fn state_of_a_hanging_disk_is_discarded() {
    for is_reading in [false, true] {
        let (commands, _queue) = sync_channel(QUEUED_MAX);
        let (_end, thread_end) = oneshot::channel();
        let mut state = StateStore { commands: Some(commands), is_lost: Arc::default(), thread_end };
        if is_reading {
            let mut pieces = state.read().await;
            assert!(pieces.recv().await.unwrap().is_err());
            state.abort().await;
        } else {
            assert!(state.summary().await.meta.is_none());
        }
        assert!(state.commands.is_none() && state.is_lost.load(Ordering::Relaxed));
    }
}

async fn read(state: &mut StateStore) -> Value {
    let mut pieces = state.read().await;
    let (mut all, mut large) = (json!({}), None);
    while let Some(piece) = pieces.recv().await {
        match piece.unwrap() {
            Piece::Head(_) => {}
            Piece::Module { id, text } => all[id] = text.into(),
            Piece::Directory(dir, json) => all[dir.as_str()] = serde_json::from_slice(&json).unwrap(),
            Piece::Begin(dir) => large = Some(dir),
            Piece::Entry(key, value) => {
                let dir = large.as_ref().unwrap().as_str();
                all[dir][key] = serde_json::from_slice(&value).unwrap();
            }
            Piece::End => large = None,
        }
    }
    all
}

async fn archive(state: &mut StateStore, pieces: &[Piece], seed: u8) {
    for piece in pieces {
        state.write_piece(piece).await;
    }
    state.commit(meta(seed)).await;
}

async fn delta(state: &mut StateStore, dirs: &[(&str, Option<u8>)], patch: &Value) {
    let dirs = dirs.iter().map(|(dir, seed)| (dir.parse().unwrap(), seed.map(|seed| Digest::of(&[seed]))));
    let patch = serde_json::value::to_raw_value(patch).unwrap();
    state.send(Command::ApplyDelta { dirs: dirs.collect(), patch }).await;
}

#[tokio::test]
async fn commits_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = open(dir.path());
    assert_eq!(read(&mut state).await, json!({}));
    let large = "x".repeat(PATCH_BYTES_MAX);
    let pieces = [
        head(&[("/pods/a", 1), ("/pods/b", 1), ("/pods", 1)], &[("m", "1"), ("n", "1")]),
        module("m", "1"),
        module("n", "1"),
        directory("/pods/a", &json!({ "x": 1, "50%/~": [1] })),
        Piece::Begin("/pods/b".parse().unwrap()),
        Piece::Entry("large".into(), json!(large).to_string().into()),
        Piece::Entry("small".into(), b"2".to_vec()),
        Piece::End,
        directory("/pods", &json!({ "ab": {} })),
    ];
    archive(&mut state, &pieces, 1).await;
    let ops = json!([
        { "op": "remove", "path": "/pods/a/50%25~1~0" },
        { "op": "add", "path": "/pods/a/y~1z", "value": { "v": 1.50 } },
        { "op": "add", "path": "/pods/c", "value": { "k": 1 } },
        { "op": "add", "path": "/pods/b/small", "value": 3 },
        { "op": "add", "path": "/pods/a/y~1z/m", "value": { "50%": 2.50, "n": {} } },
        { "op": "add", "path": "/pods/a/y~1z/m/n/o", "value": [1] },
        { "op": "remove", "path": "/pods/a/y~1z/m/50%25" },
        { "op": "add", "path": "/pods/a/null", "value": null },
        { "op": "add", "path": "/pods/a/y~1z/w", "value": null },
    ]);
    delta(&mut state, &[("/pods/a", Some(2)), ("/pods/b", Some(2)), ("/pods/c", Some(1))], &ops).await;
    state.write_modules(BTreeMap::from([("m".into(), Some("2".into())), ("n".into(), None)])).await;
    state.commit(meta(2)).await;
    let mut expected = json!({
        "m": "2", "/pods": { "ab": {} },
        "/pods/a": { "null": null, "x": 1, "y/z": { "v": 1.50, "m": { "n": { "o": [1] } }, "w": null } },
        "/pods/b": { "large": large, "small": 3 }, "/pods/c": { "k": 1 },
    });
    assert_eq!(read(&mut state).await, expected);
    delta(&mut state, &[("/pods/c", None)], &json!([{ "op": "remove", "path": "/pods/c" }])).await;
    state.close().await;
    let mut state = open(dir.path());
    assert_eq!(read(&mut state).await, expected);
    assert_eq!(state.summary().await.meta.unwrap().revision, meta(2).revision);
    delta(&mut state, &[("/pods/c", None)], &json!([{ "op": "remove", "path": "/pods/c" }])).await;
    state.commit(meta(3)).await;
    expected.as_object_mut().unwrap().remove("/pods/c");
    assert_eq!(read(&mut state).await, expected);
    // Reconcile responses contain differences only.
    let pieces = [head(&[("/pods/a", 2), ("/pods/b", 9)], &[("m", "2")]), directory("/pods/b", &json!({}))];
    archive(&mut state, &pieces, 4).await;
    let expected = json!({ "m": "2", "/pods/a": expected["/pods/a"], "/pods/b": {} });
    assert_eq!(read(&mut state).await, expected);
}

/// A commit just before SIGTERM is synced.
#[tokio::test]
async fn closed_state_is_synced_and_unlocked() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = open(dir.path());
    archive(&mut state, &[head(&[("/a", 1)], &[]), directory("/a", &json!({ "k": 1 }))], 1).await;
    state.close().await;
    let mut state = open(dir.path());
    assert_eq!(read(&mut state).await, json!({ "/a": { "k": 1 } }));
}

#[tokio::test]
async fn incomplete_state_is_discarded() {
    for pieces in [
        vec![head(&[("/a", 1)], &[])],
        vec![head(&[], &[("m", "1")])],
        vec![head(&[("/a", 1)], &[]), directory("/a", &json!(1))],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut state = open(dir.path());
        archive(&mut state, &[head(&[("/b", 1)], &[]), directory("/b", &json!({}))], 1).await;
        archive(&mut state, &pieces, 2).await;
        assert_eq!(read(&mut state).await, json!({}), "the state is empty");
        state.close().await;
        assert_eq!(read(&mut open(dir.path())).await, json!({}), "nor after a restart");
    }
}

#[tokio::test]
async fn damaged_file_is_removed_or_intact() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("main.redb");
    let mut intact = 0;
    for step in 0..64 {
        let mut state = open(dir.path());
        let pieces = [head(&[("/a", 1)], &[]), directory("/a", &json!({ "k": "x".repeat(20_000) }))];
        archive(&mut state, &pieces, 1).await;
        let expected = read(&mut state).await;
        state.close().await;
        open(dir.path()).close().await;
        open(dir.path()).close().await;
        let mut bytes = std::fs::read(&file).unwrap();
        let offset = bytes.len() * step / 64 + step;
        bytes[offset] ^= 0x40;
        if step % 8 == 7 {
            bytes.truncate(offset);
        }
        std::fs::write(&file, bytes).unwrap();
        let mut state = open(dir.path());
        let found = read(&mut state).await;
        state.close().await;
        assert!(found == json!({}) || found == expected, "byte {offset}");
        intact += usize::from(found == expected);
        std::fs::remove_file(&file).unwrap();
    }
    assert!(intact < 60, "most damage affects the content: {intact}");
}
