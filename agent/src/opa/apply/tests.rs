use serde_json::{Value, json};

use super::*;
use crate::fake_opa::FakeOpa;

fn path(path: &str) -> DirPath {
    path.parse().unwrap()
}

fn raw(value: &Value) -> Box<RawValue> {
    RawValue::from_string(value.to_string()).unwrap()
}

/// A delta from `marker` that gives `/shop/a` another digest.
fn delta<'a>(marker: &Marker, ops: usize, patch: &'a RawValue) -> Delta<'a> {
    let mut next = marker.clone();
    let digest = Some(Digest::of(patch.get().as_bytes()));
    next.dirs.insert(path("/shop/a"), digest);
    Delta {
        from: marker.data_digest(),
        to: next.data_digest(),
        position: Position::default(),
        newest: None,
        ensure: Vec::new(),
        dirs: BTreeMap::from([(path("/shop/a"), digest)]),
        narrows: false,
        ops,
        patch,
    }
}

/// An OPA that was loaded with one directory.
async fn loaded() -> (FakeOpa, Applier, Marker) {
    let (fake, opa) = FakeOpa::start().await;
    let mut applier = Applier::new(opa, "main".to_owned());
    assert_eq!(applier.claim().await.unwrap(), None);
    let dirs = BTreeMap::from([(path("/shop/a"), Digest::of(b"1"))]);
    let head = Head { data: Some(DataHead { dirs, ensure: Vec::new() }), ..Head::default() };
    let (out, mut pieces) = mpsc::channel(2);
    out.try_send(Ok(Piece::Head(head))).unwrap();
    let json = br#"{"k":{"n":null},"l":1}"#.to_vec();
    out.try_send(Ok(Piece::Directory(path("/shop/a"), json))).unwrap();
    drop(out);
    let (mut marker, _) = applier.archive(None, false, Position::default(), &mut pieces).await.unwrap();
    assert_eq!(marker.revision, None);
    applier.modules(&mut marker, &BTreeMap::new(), None).await.unwrap();
    assert_eq!(
        fake.with(|world| world.data["shop"].clone()),
        json!({ "a": { "k": { "n": null }, "l": 1 } })
    );
    assert_marked(&applier, &marker).await;
    fake.log();
    (fake, applier, marker)
}

async fn assert_marked(applier: &Applier, marker: &Marker) {
    assert_eq!(applier.opa.marker("main").await.unwrap().as_ref(), Some(marker));
    assert!(applier.opa.holds("main", marker.revision).await.unwrap());
}

#[tokio::test]
async fn a_frame_is_one_patch_with_its_marker() {
    let (fake, applier, mut marker) = loaded().await;
    let patch = raw(&json!([
        { "op": "add", "path": "/shop/a/m", "value": null },
        { "op": "add", "path": "/shop/a/k/n", "value": [null] },
        { "op": "remove", "path": "/shop/a/l" },
    ]));
    let frame = delta(&marker, 3, &patch);
    applier.delta(&mut marker, &frame).await.unwrap();
    assert_eq!(marker.revision.unwrap().data, frame.to);
    assert_eq!(fake.log(), ["PATCH data 204"]);
    assert_eq!(
        fake.with(|world| world.data["shop"]["a"].clone()),
        json!({ "k": { "n": [null] }, "m": null })
    );
    assert_marked(&applier, &marker).await;
    // It is not what OPA holds any more.
    let error = applier.delta(&mut marker, &frame).await.unwrap_err();
    assert!(matches!(error, Error::NotHeld { .. }), "{error}");
}

#[tokio::test]
async fn a_large_frame_is_bounded_patches() {
    let (fake, applier, mut marker) = loaded().await;
    let value = "x".repeat(PATCH_BYTES_MAX / 2);
    let ops: Vec<_> = (0..FRAME_PATCH_BYTES_MAX / value.len())
        .map(|at| json!({ "op": "add", "path": format!("/shop/a/{at}"), "value": value }))
        .collect();
    let patch = raw(&json!(ops));
    let frame = delta(&marker, ops.len(), &patch);
    applier.delta(&mut marker, &frame).await.unwrap();
    let log = fake.log();
    assert!(log.len() > 4 && log.iter().all(|request| request == "PATCH data 204"), "{log:?}");
    let held = fake.with(|world| world.data["shop"]["a"].as_object().map(serde_json::Map::len));
    assert_eq!(held, Some(ops.len() + 2));
    assert_marked(&applier, &marker).await;
    // Cut off in the middle: the marker in OPA names no revision.
    let frame = delta(&marker, ops.len(), &patch);
    fake.with(|world| world.fails_after = Some(2));
    applier.delta(&mut marker, &frame).await.unwrap_err();
    fake.with(|world| world.fails_after = None);
    let held = applier.opa.marker("main").await.unwrap().unwrap();
    assert_eq!((held.revision, held.dirs[&path("/shop/a")]), (None, None));
}

#[tokio::test]
async fn what_another_session_or_a_restart_came_before_is_refused() {
    let patch = raw(&json!([{ "op": "add", "path": "/shop/a/m", "value": 1 }]));
    for is_restart in [true, false] {
        let (fake, applier, mut marker) = loaded().await;
        if is_restart {
            fake.with(|world| world.data = json!({}));
        } else {
            Applier::new(applier.opa.clone(), "main".to_owned()).claim().await.unwrap();
        }
        let before = fake.with(|world| world.data.clone());
        let frame = delta(&marker, 1, &patch);
        let error = applier.delta(&mut marker, &frame).await.unwrap_err();
        assert!(matches!(error, Error::OtherWriter), "{error}");
        assert_eq!(fake.with(|world| world.data.clone()), before);
    }
}

#[tokio::test]
async fn a_directory_that_others_removed_is_noticed() {
    let (fake, mut applier, marker) = loaded().await;
    applier.verified.1 = Instant::now();
    applier.verify(&marker).await.unwrap();
    assert!(fake.log().is_empty(), "it is not time yet");
    for is_there in [true, false] {
        if !is_there {
            fake.with(|world| world.data["shop"] = json!({}));
        }
        applier.verified.1 = Instant::now().checked_sub(VERIFY_INTERVAL).unwrap();
        let result = applier.verify(&marker).await;
        assert_eq!(result.is_ok(), is_there, "{result:?}");
    }
    assert_eq!(fake.log(), ["PUT data/shop/a 304", "PUT data/shop/a 204", "PATCH data 204"]);
    let held = applier.opa.marker("main").await.unwrap().unwrap();
    assert_eq!((held.revision, held.dirs[&path("/shop/a")]), (None, None));
}

/// A trial that an error ended is taken back in the next session, unless another agent had one meanwhile.
#[tokio::test]
async fn modules_of_another_session_stay() {
    let put = |texts: [&str; 2]| -> BTreeMap<_, _> {
        ["a", "b"].into_iter().map(str::to_owned).zip(texts.map(|text| Some(text.to_owned()))).collect()
    };
    for is_other in [false, true] {
        let (fake, mut applier, mut marker) = loaded().await;
        applier.modules(&mut marker, &put(["has x", "has y"]), None).await.unwrap();
        let mut errors = 0;
        while !applier.rounds.is_cut_off() {
            fake.with(|world| world.fails_after = Some(errors));
            applier.modules(&mut marker, &put(["has y", "has x"]), None).await.unwrap_err();
            errors += 1;
        }
        fake.with(|world| world.fails_after = None);
        let expected = if is_other { "has z" } else { "has x" };
        if is_other {
            Applier::new(applier.opa.clone(), "main".to_owned()).claim().await.unwrap();
            fake.with(|world| _ = world.modules.insert("a".to_owned(), expected.to_owned()));
        }
        applier.claim().await.unwrap();
        assert_eq!(fake.with(|world| world.modules["a"].clone()), expected);
    }
}

/// A5: modules that this OPA refuses take no good ones out, at later changes neither.
#[tokio::test]
async fn refused_modules_leave_the_marker_and_the_others() {
    let (fake, mut applier, mut marker) = loaded().await;
    let texts = |texts: &[(&str, &str)]| -> BTreeMap<_, _> {
        texts.iter().map(|(id, text)| ((*id).to_owned(), Some((*text).to_owned()))).collect()
    };
    applier.modules(&mut marker, &texts(&[("a", "has x"), ("b", "has y")]), None).await.unwrap();
    let before = marker.clone();
    fake.log();
    for _ in 0..2 {
        let changes = texts(&[("a", "has x\nodd"), ("b", "has y\nodd")]);
        let refused = applier.modules(&mut marker, &changes, None).await.unwrap();
        assert_eq!(refused.len(), 2);
        assert_eq!(marker, before);
    }
    let log = fake.log();
    assert_eq!(log.iter().filter(|request| request.contains("policies/")).count(), 2, "{log:?}");
    assert_eq!(fake.with(|world| world.modules["a"].clone()), "has x");
    assert_marked(&applier, &marker).await;
    // OPA restarts, and may be another one.
    fake.with(|world| world.data = json!({}));
    assert_eq!(applier.claim().await.unwrap(), None);
    assert!(
        applier
            .rounds
            .turn(&applier.opa, &texts(&[("a", "odd")]))
            .await
            .unwrap()
            .refused
            .contains_key("a")
    );
    assert!(fake.log().contains(&"PUT policies/a 400".to_owned()));
}
