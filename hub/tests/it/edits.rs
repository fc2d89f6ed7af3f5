//! I1: edits of a value, applied in sequence or merged, give OPA the hub's value.

use std::sync::Arc;

use opa_hub::snapshot::edit::{Edit, merge};
use opa_hub_loadtest::lab::opa::Opa;
use opa_hub_proto::patch::PatchWriter;
use serde_json::{Value, json};

const ROUNDS: usize = 500;
const STEPS: usize = 4;

fn object(random: &mut fastrand::Rng, depth: usize) -> Value {
    let mut object = json!({});
    for name in ["a", "b~c", "d/e", "f%", "0", "-", "é"] {
        object[name] = match random.u8(..8) {
            0 | 1 => continue,
            2 | 3 if depth > 0 => self::object(random, depth - 1),
            4 => json!([random.u8(..3), { "x": random.u8(..3) }]),
            5 => json!(null),
            6 => json!({}),
            _ => json!(random.u8(..3)),
        };
    }
    object
}

/// Changes, adds or removes a member at some depth, including nulls and re-added members.
fn change(random: &mut fastrand::Rng, value: &mut Value) {
    let name = ["a", "b~c", "d/e", "f%", "0", "-"][random.usize(..6)];
    match random.u8(..4) {
        0 | 1 if value[name].is_object() => change(random, &mut value[name]),
        0 => value[name] = object(random, 1),
        1 => value[name] = Value::Null,
        2 => value[name] = random.u8(..3).into(),
        _ => _ = value.as_object_mut().unwrap().remove(name),
    }
}

#[tokio::test]
async fn i1_edits_give_opa_the_value_of_the_hub() {
    let assets = tokio::task::spawn_blocking(opa_hub_loadtest::lab::assets::folder).await.unwrap().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let opa = Opa::start(&assets, dir.path(), None, &[]).await.unwrap();
    let http = opa_hub_loadtest::lab::http().unwrap();
    let url = format!("{}/v1/data/d", opa.url);
    let (mut single, mut merged, mut cancelled) = (0, 0, 0);
    for seed in 0..ROUNDS {
        let random = &mut fastrand::Rng::with_seed(seed as u64);
        let mut first = object(random, 2);
        // Edits are sent only if much of the value is unchanged.
        first["rest"] = "x".repeat(4000).into();
        let (mut last, mut edits) = (first.clone(), Vec::new());
        for _ in 0..random.usize(1..=STEPS) {
            let mut next = last.clone();
            change(random, &mut next);
            let text = |value: &Value| value.to_string().into_bytes();
            let Some(edit) = Edit::between(&text(&last), &text(&next)) else { break };
            last = next;
            edits.push(Arc::new(edit));
        }
        let mut patch = PatchWriter::default();
        let ops =
            merge(&edits, last.to_string().as_bytes()).unwrap_or_else(|| panic!("seed {seed}: no edit"));
        for (below, value) in &ops {
            patch.member(&"/d".parse().unwrap(), "k", below, value.map(str::as_bytes));
        }
        let put = http.put(&url).body(json!({ "k": first }).to_string()).send().await.unwrap();
        assert!(put.status().is_success());
        let text = String::from_utf8(patch.into_array()).unwrap();
        let patched =
            http.patch(format!("{}/v1/data", opa.url)).header("content-type", "application/json-patch+json");
        let patched = patched.body(text.clone()).send().await.unwrap();
        assert!(patched.status().is_success(), "seed {seed}: {} {text}", patched.status());
        let found: Value =
            serde_json::from_slice(&http.get(&url).send().await.unwrap().bytes().await.unwrap()).unwrap();
        let rest = |value: &Value| {
            let mut value = value.clone();
            value.as_object_mut().unwrap().remove("rest");
            value
        };
        assert_eq!(rest(&found["result"]["k"]), rest(&last), "seed {seed}: {text} onto {}", rest(&first));
        single += usize::from(edits.len() == 1 && !ops.is_empty());
        merged += usize::from(edits.len() > 1 && !ops.is_empty());
        cancelled += usize::from(!edits.is_empty() && ops.is_empty());
    }
    assert!(
        single > 50 && merged > 150 && cancelled > 3,
        "{single} single, {merged} merged, {cancelled} cancelled"
    );
}
