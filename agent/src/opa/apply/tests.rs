use std::collections::BTreeMap;

use opa_hub_proto::head::{DataHead, Head};
use opa_hub_proto::position::Position;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::*;
use crate::archive::Piece;
use crate::opa::fake_opa::FakeOpa;

fn path(path: &str) -> DirPath {
    path.parse().unwrap()
}

fn raw(value: &Value) -> Box<RawValue> {
    RawValue::from_string(value.to_string()).unwrap()
}

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
    let (mut marker, _) = applier.load(None, false, Position::default(), &mut pieces).await.unwrap();
    assert_eq!(marker.revision, None);
    applier.apply_modules(&mut marker, &BTreeMap::new(), None).await.unwrap();
    assert_eq!(fake.with(|world| world.data["shop"].clone()), json!({ "a": { "k": { "n": null }, "l": 1 } }));
    assert_marked(&applier, &marker).await;
    fake.log();
    (fake, applier, marker)
}

async fn assert_marked(applier: &Applier, marker: &Marker) {
    assert_eq!(applier.opa.marker("main").await.unwrap().as_ref(), Some(marker));
    assert!(applier.opa.has_revision("main", marker.revision).await.unwrap());
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
    applier.apply_delta(&mut marker, &frame).await.unwrap();
    assert_eq!(marker.revision.unwrap().data, frame.to);
    assert_eq!(fake.log(), ["PATCH data 204"]);
    assert_eq!(
        fake.with(|world| world.data["shop"]["a"].clone()),
        json!({ "k": { "n": [null] }, "m": null })
    );
    assert_marked(&applier, &marker).await;
    // OPA is past the frame's base.
    let error = applier.apply_delta(&mut marker, &frame).await.unwrap_err();
    assert!(matches!(error, Error::WrongBase { .. }), "{error}");
}

#[tokio::test]
async fn a_large_frame_is_bounded_patches() {
    let (fake, applier, mut marker) = loaded().await;
    let value = "x".repeat(PATCH_BYTES_MAX / 2);
    let ops: Vec<_> = (0..FRAME_PATCH_BYTES_MAX / value.len())
        .map(|key| json!({ "op": "add", "path": format!("/shop/a/{key}"), "value": value }))
        .collect();
    let patch = raw(&json!(ops));
    let frame = delta(&marker, ops.len(), &patch);
    applier.apply_delta(&mut marker, &frame).await.unwrap();
    let log = fake.log();
    assert!(log.len() > 4 && log.iter().all(|request| request == "PATCH data 204"), "{log:?}");
    let entries = fake.with(|world| world.data["shop"]["a"].as_object().map(serde_json::Map::len));
    assert_eq!(entries, Some(ops.len() + 2));
    assert_marked(&applier, &marker).await;
    // An interrupted frame leaves no revision.
    let frame = delta(&marker, ops.len(), &patch);
    fake.with(|world| world.fails_after = Some(2));
    applier.apply_delta(&mut marker, &frame).await.unwrap_err();
    fake.with(|world| world.fails_after = None);
    let marker = applier.opa.marker("main").await.unwrap().unwrap();
    assert_eq!((marker.revision, marker.dirs[&path("/shop/a")]), (None, None));
}

#[tokio::test]
async fn frames_fail_after_another_session_or_a_restart() {
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
        let error = applier.apply_delta(&mut marker, &frame).await.unwrap_err();
        assert!(matches!(error, Error::OtherWriter), "{error}");
        assert_eq!(fake.with(|world| world.data.clone()), before);
    }
}

#[tokio::test]
async fn removed_directory_is_detected() {
    let (fake, mut applier, marker) = loaded().await;
    applier.verified_at = Instant::now();
    applier.verify(&marker).await.unwrap();
    assert!(fake.log().is_empty(), "the interval has not elapsed");
    for exists in [true, false] {
        if !exists {
            fake.with(|world| world.data["shop"] = json!({}));
        }
        applier.verified_at = Instant::now().checked_sub(VERIFY_INTERVAL).unwrap();
        let result = applier.verify(&marker).await;
        assert_eq!(result.is_ok(), exists, "{result:?}");
    }
    assert_eq!(fake.log(), ["PUT data/shop/a 304", "PUT data/shop/a 204", "PATCH data 204"]);
    let marker = applier.opa.marker("main").await.unwrap().unwrap();
    assert_eq!((marker.revision, marker.dirs[&path("/shop/a")]), (None, None));
}

/// The next session rolls back, unless another agent had one.
#[tokio::test]
async fn modules_of_another_session_remain() {
    let put = |texts: [&str; 2]| -> BTreeMap<_, _> {
        ["a", "b"].into_iter().map(str::to_owned).zip(texts.map(|text| Some(text.to_owned()))).collect()
    };
    for is_other in [false, true] {
        let (fake, mut applier, mut marker) = loaded().await;
        applier.apply_modules(&mut marker, &put(["has x", "has y"]), None).await.unwrap();
        let mut errors = 0;
        while !applier.modules.is_interrupted() {
            fake.with(|world| world.fails_after = Some(errors));
            applier.apply_modules(&mut marker, &put(["has y", "has x"]), None).await.unwrap_err();
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

/// A5: rejected modules remove no others.
#[tokio::test]
async fn rejected_modules_change_neither_marker_nor_others() {
    let (fake, mut applier, mut marker) = loaded().await;
    let texts = |texts: &[(&str, &str)]| -> BTreeMap<_, _> {
        texts.iter().map(|(id, text)| ((*id).to_owned(), Some((*text).to_owned()))).collect()
    };
    applier.apply_modules(&mut marker, &texts(&[("a", "has x"), ("b", "has y")]), None).await.unwrap();
    let before = marker.clone();
    fake.log();
    for _ in 0..2 {
        let changes = texts(&[("a", "has x\nodd"), ("b", "has y\nodd")]);
        let rejected = applier.apply_modules(&mut marker, &changes, None).await.unwrap();
        assert_eq!(rejected.len(), 2);
        assert_eq!(marker, before);
    }
    let log = fake.log();
    assert_eq!(log.iter().filter(|request| request.contains("policies/")).count(), 2, "{log:?}");
    assert_eq!(fake.with(|world| world.modules["a"].clone()), "has x");
    assert_marked(&applier, &marker).await;
    // OPA may have another version now.
    fake.with(|world| world.data = json!({}));
    assert_eq!(applier.claim().await.unwrap(), None);
    assert!(
        applier
            .modules
            .apply(&applier.opa, &texts(&[("a", "odd")]))
            .await
            .unwrap()
            .rejected
            .contains_key("a")
    );
    assert!(fake.log().contains(&"PUT policies/a 400".to_owned()));
}
