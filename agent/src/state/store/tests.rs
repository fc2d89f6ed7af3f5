use serde_json::{Value, json};

use super::*;

fn meta(at: u8) -> Meta {
    let digest = Digest::of(&[at]);
    Meta {
        revision: Revision { modules: digest, data: digest },
        position: Position::default(),
        ensure: vec!["/pods".parse().unwrap()],
        rego_version: None,
        reads: None,
        etag: None,
    }
}

fn head(dirs: &[(&str, u8)], modules: &[(&str, &str)]) -> Piece {
    let dirs = dirs.iter().map(|(dir, at)| (dir.parse().unwrap(), Digest::of(&[*at]))).collect();
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

fn open(dir: &Path) -> State {
    State::open(dir.to_owned(), "main", None).unwrap()
}

/// A disk that hangs keeps no OPA waiting.
#[tokio::test(start_paused = true)]
async fn a_disk_that_hangs_is_given_up() {
    for is_reading in [false, true] {
        let (changes, _hangs) = sync_channel(WAITING_MAX);
        let (_end, ended) = oneshot::channel();
        let mut state = State { changes: Some(changes), is_lost: Arc::default(), ended };
        if is_reading {
            let mut pieces = state.read().await;
            assert!(pieces.recv().await.unwrap().is_err());
            state.abort().await;
        } else {
            assert!(state.content().await.meta.is_none());
        }
        assert!(state.changes.is_none() && state.is_lost.load(Ordering::Relaxed));
    }
}

/// All that is read back: data by directory, and texts of modules.
async fn read(state: &mut State) -> Value {
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

async fn archive(state: &mut State, pieces: &[Piece], at: u8) {
    for piece in pieces {
        state.piece(piece).await;
    }
    state.commit(meta(at)).await;
}

async fn delta(state: &mut State, dirs: &[(&str, Option<u8>)], patch: &Value) {
    let dirs = dirs.iter().map(|(dir, at)| (dir.parse().unwrap(), at.map(|at| Digest::of(&[at]))));
    let patch = serde_json::value::to_raw_value(patch).unwrap();
    state.send(Change::Delta { dirs: dirs.collect(), patch }).await;
}

#[tokio::test]
async fn what_was_committed_is_there_after_a_restart() {
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
    state.modules(BTreeMap::from([("m".into(), Some("2".into())), ("n".into(), None)])).await;
    state.commit(meta(2)).await;
    let mut expected = json!({
        "m": "2", "/pods": { "ab": {} },
        "/pods/a": { "null": null, "x": 1, "y/z": { "v": 1.50, "m": { "n": { "o": [1] } }, "w": null } },
        "/pods/b": { "large": large, "small": 3 }, "/pods/c": { "k": 1 },
    });
    assert_eq!(read(&mut state).await, expected);
    // What is not committed is not there.
    delta(&mut state, &[("/pods/c", None)], &json!([{ "op": "remove", "path": "/pods/c" }])).await;
    state.close().await;
    let mut state = open(dir.path());
    assert_eq!(read(&mut state).await, expected);
    assert_eq!(state.content().await.meta.unwrap().revision, meta(2).revision);
    delta(&mut state, &[("/pods/c", None)], &json!([{ "op": "remove", "path": "/pods/c" }])).await;
    state.commit(meta(3)).await;
    expected.as_object_mut().unwrap().remove("/pods/c");
    assert_eq!(read(&mut state).await, expected);
    // An answer to reconcile brings what differs.
    let pieces =
        [head(&[("/pods/a", 2), ("/pods/b", 9)], &[("m", "2")]), directory("/pods/b", &json!({}))];
    archive(&mut state, &pieces, 4).await;
    let expected = json!({ "m": "2", "/pods/a": expected["/pods/a"], "/pods/b": {} });
    assert_eq!(read(&mut state).await, expected);
}

/// What was committed just before SIGTERM is synced before the process ends.
#[tokio::test]
async fn a_closed_state_is_synced_and_free() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = open(dir.path());
    archive(&mut state, &[head(&[("/a", 1)], &[]), directory("/a", &json!({ "k": 1 }))], 1).await;
    state.close().await;
    let mut state = open(dir.path());
    assert_eq!(read(&mut state).await, json!({ "/a": { "k": 1 } }));
}

#[tokio::test]
async fn a_state_that_would_be_wrong_is_given_up() {
    for pieces in [
        vec![head(&[("/a", 1)], &[])],
        vec![head(&[], &[("m", "1")])],
        vec![head(&[("/a", 1)], &[]), directory("/a", &json!(1))],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut state = open(dir.path());
        archive(&mut state, &[head(&[("/b", 1)], &[]), directory("/b", &json!({}))], 1).await;
        archive(&mut state, &pieces, 2).await;
        assert_eq!(read(&mut state).await, json!({}), "it tells nothing");
        state.close().await;
        assert_eq!(read(&mut open(dir.path())).await, json!({}), "nor after a restart");
    }
}

#[tokio::test]
async fn a_damaged_file_is_no_state() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("main.redb");
    let mut intact = 0;
    for at in 0..64 {
        let mut state = open(dir.path());
        let pieces = [head(&[("/a", 1)], &[]), directory("/a", &json!({ "k": "x".repeat(20_000) }))];
        archive(&mut state, &pieces, 1).await;
        let expected = read(&mut state).await;
        state.close().await;
        open(dir.path()).close().await;
        open(dir.path()).close().await;
        let mut bytes = std::fs::read(&file).unwrap();
        let place = bytes.len() * at / 64 + at;
        bytes[place] ^= 0x40;
        if at % 8 == 7 {
            bytes.truncate(place);
        }
        std::fs::write(&file, bytes).unwrap();
        let mut state = open(dir.path());
        let found = read(&mut state).await;
        state.close().await;
        assert!(found == json!({}) || found == expected, "byte {place}");
        intact += usize::from(found == expected);
        std::fs::remove_file(&file).unwrap();
    }
    assert!(intact < 60, "most damage is in what counts: {intact}");
}
