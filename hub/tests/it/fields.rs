//! I7: decisions on pruned objects equal decisions on whole objects, in a real OPA, for generated policies, objects and
//! inputs.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use opa_hub::fields::masks::FieldMasks;
use opa_hub::policy::check::{Compiler, Dialect};
use opa_hub::policy::modules::Module;
use opa_hub::policy::reads::Analyst;
use opa_hub_loadtest::lab::opa::Opa;
use opa_hub_proto::path::DirPath;
use serde_json::{Value, json};

use crate::lived_in::{cut, cut_all, lived_in};

/// Number of rounds with new rules, fields, objects and inputs; set by `OPA_HUB_FIELD_ROUNDS`.
const ROUNDS: u64 = 240;
/// Rules per policy. With more, some rule always reads everything.
const RULES: usize = 4;
const INPUTS: usize = 12;

/// References to a pod. In rules, `$f` and `$g` are its fields.
const PODS: [&str; 6] = [
    "data.kubernetes.pods[input.ns][input.name]",
    "data.kubernetes.pods.a[_]",
    "data.kubernetes[\"pods\"][_].p1",
    "pods.b.p2",
    "the_pod(1)",
    "picked(input.name)",
];
const FIELDS: [&str; 14] = [
    "metadata.labels.app",
    "metadata.labels[input.key]",
    "metadata.labels",
    "metadata.name",
    "spec.containers[_].image",
    "spec.containers[0].image",
    "spec.containers[input.index]",
    "spec.containers",
    "spec.hostNetwork",
    "status.podIP",
    "status",
    "metadata.annotations[\"a/b\"]",
    "spec[input.key]",
    "nothing.at.all",
];
/// Rule bodies with every construct that the analysis follows, or must treat as reading everything.
const BODIES: [&str; 136] = [
    "if $p.$f",
    "if not $p.$f",
    ":= $p.$f",
    ":= x if { x := $p.$f; x != null }",
    "if $p.$f == \"web\"",
    "if $p.$f == input.value",
    "if $p.$f == $p.$g",
    "if $p.$f != $p.$g",
    "if startswith($p.$f, \"w\")",
    ":= count($p.$f)",
    ":= sprintf(\"%v\", [$p.$f])",
    "if { q := $p; q.$f; r := q; r.$g == \"web\" }",
    "if \"web\" in $p.$f",
    "if { some k, v in $p.$f; k == v }",
    "if { some k; $p.$f[k] == \"web\" }",
    ":= [x | x := $p.$f]",
    ":= {x | x := $p.$f; is_string(x)}",
    ":= {k: v | some k, v in $p.$f}",
    ":= object.get($p, \"metadata\", {\"labels\": 1})",
    ":= object.get($p, [\"status\", \"podIP\"], \"none\")",
    ":= object.get(object.get($p, \"spec\", {}), \"hostNetwork\", false)",
    ":= object.get($p, input.key, \"none\")",
    ":= object.keys($p.$f)",
    ":= object.union($p.metadata, {\"x\": 1})",
    ":= json.filter($p, [\"metadata/labels/app\", \"status\"])",
    ":= json.filter($p, {\"/spec/hostNetwork\", \"status/podIP\", \"metadata/annotations/a~1b\"})",
    ":= json.filter($p, [\"spec/containers/0/image\", \"no/such\", \"metadata/labels/app/x\"])",
    ":= json.filter($p, [input.path])",
    ":= json.filter($p.metadata, [[\"labels\", \"app\"]])",
    ":= object.filter($p.metadata, [\"labels\", \"name\"])",
    ":= object.get($p, [\"spec\", \"containers\", 0, \"image\"], \"none\")",
    ":= object.get($p, [\"metadata\", \"labels\"], {}).app",
    ":= json.remove($p, [\"metadata/labels\"])",
    ":= [path | walk($p, [path, value]); value == \"web\"]",
    "if every c in $p.spec.containers { c.image != input.value }",
    "if every k, v in $p.$f { k != v }",
    ":= field($p)",
    ":= part($p).labels.app",
    ":= part($p)",
    ":= pair($p)[0].app",
    ":= pair($p)[1]",
    ":= {\"a\": $p.$f, \"b\": $p.$g}.a",
    ":= held if { held := {\"x\": $p}; held.x.$f == \"web\" }",
    ":= y if { list := [$p, $p]; y := list[_].$f }",
    "if { {\"app\": app} = $p.metadata.labels; app == \"web\" }",
    "if { [first, _] = $p.spec.containers; first.image == \"i0\" }",
    ":= \"one\" if { $p.$f == \"web\" } else := \"two\" if { $p.$g } else := \"three\"",
    ":= x if { x := helper.$f with data.other as $p }",
    ":= x if { x := shown with input as $p }",
    ":= data.kubernetes.pods[$p.metadata.namespace][$p.metadata.name].$f",
    ":= input.table[$p.$f]",
    "if is_object($p.$f)",
    ":= concat(\",\", [$p.$f, \"x\"])",
    // Sets compare their members.
    ":= count({x | x := $p.$f})",
    ":= count({x | x := $p.spec.containers[_]})",
    ":= sum([1 | some _ in {x | x := $p.spec.containers[_]}])",
    "if { s := {x | x := $p.spec.containers[_]}; some c; s[c]; c.image == \"i1\" }",
    "if { s := {x | x := $p.$f}; s[input.labels] }",
    "if { s := {x | x := $p.spec.containers[_]}; s[input.container] }",
    ":= [x.image | some x in {y | y := $p.spec.containers[_]}][0]",
    ":= [q.metadata.name | some q in {q | some q in pods[_]}][0]",
    ":= c.image if { h.containers($p)[c]; c.args[0] == \"web\" }",
    ":= count(h.containers($p))",
    ":= pod.$f if { h.running[pod]; pod.spec.hostNetwork }",
    "if h.known[input.labels]",
    ":= count(h.known)",
    // Paths with dynamic and unusual elements.
    ":= object.get(pods, [input.ns, input.name, \"status\", \"podIP\"], \"none\")",
    ":= object.get(pods, [input.ns, input.odd, \"spec\", \"nodeName\"], \"none\")",
    ":= object.get($p, [\"metadata\", input.odd, \"app\"], \"none\")",
    ":= object.get($p, [\"spec\", \"containers\", input.odd, \"image\"], input.value)",
    ":= object.get($p, [\"status\", \"list\", 2], \"web\") == \"web\"",
    ":= object.get($p, [\"status\", null, [\"list\"], 1.5, true], \"none\")",
    ":= object.get($p, [$p.$f, \"app\"], \"none\")",
    ":= object.get($p, [], \"none\")",
    ":= object.get($p, [\"spec\", \"nodeName\", \"deeper\"], {\"no\": 1})",
    ":= object.get($p, {\"metadata\"}, \"none\")",
    ":= object.get($p, the_path, \"none\")",
    ":= x if { list := [\"spec\", \"nodeName\"]; x := object.get($p, list, \"none\") }",
    ":= x if { list := array.concat([\"spec\"], [\"nodeName\"]); x := object.get($p, list, \"none\") }",
    ":= x if { list := [word | some word in input.words]; x := object.get($p, list, \"none\") }",
    ":= object.get(object.get(pods, input.ns, {}), input.name, {}).$f",
    ":= object.get(object.get(pods, input.odd, {}), input.odd, {}).$f",
    ":= object.get(object.get(pods.a, \"p1\", {}), [\"metadata\", input.key], {})",
    ":= object.get(object.get($p, \"metadata\", {}), input.odd, {\"app\": 1}).app",
    ":= object.get($p.$f, \"app\", $p.metadata).labels",
    "if object.get($p, [\"metadata\", input.key], $p.$f) == $p.$g",
    // Names that range over constants.
    ":= x if { some f in [\"nodeName\", \"hostNetwork\"]; x := $p.spec[f] }",
    ":= x if { some f in {\"nodeName\", \"containers\"}; x := $p.spec[f] }",
    ":= x if { some f in names; x := $p.spec[f] }",
    ":= x if { name_set[f]; x := $p.spec[f] }",
    ":= x if { f := names[_]; x := $p.spec[f] }",
    ":= x if { x := $p.spec[names[input.index]] }",
    ":= x if { some f in array.concat(names, [\"containers\"]); x := $p.spec[f] }",
    ":= x if { some f in (name_set | {input.key}); x := $p.spec[f] }",
    ":= x if { some f in odd_names; x := $p.spec[f] }",
    ":= x if { odd_set[f]; x := $p.spec[f] }",
    ":= x if { some f in [g | some g in names; g != input.value]; x := $p.spec[f] }",
    ":= x if { some part, f in {\"spec\": \"nodeName\", \"status\": \"podIP\"}; x := $p[part][f] }",
    ":= x if { some [part, f] in [[\"spec\", \"nodeName\"], [\"status\", \"podIP\"]]; x := $p[part][f] }",
    ":= x if { some deep in [[[\"nodeName\"]]]; x := $p.spec[deep[_][_]] }",
    ":= x if { some i, _ in [\"a\", \"b\"]; x := $p.spec.containers[i].image }",
    ":= x if { some f in by_kind[input.key]; x := $p[f] }",
    ":= x if { some f in deep_names[input.key]; x := $p.spec[f] }",
    ":= of_field($p, \"nodeName\")",
    ":= of_field($p.spec, of_field($p, \"nodeName\"))",
    ":= of_field($p, input.key)",
    ":= x if { some f in names; x := of_field($p.spec, f) }",
    ":= x if { some f in object.get({\"a\": names}, input.value, [\"hostNetwork\"]); x := $p.spec[f] }",
    ":= x if { x := chosen($p) with input.key as \"nodeName\" }",
    ":= x if { x := whole_input(1) with input as names }",
    ":= x if { f := object.get($p.metadata, \"name\", \"nodeName\"); x := $p.spec[f] }",
    "if { some f in names; not $p.spec[f] }",
    "if every f in names { $p.spec[f] != input.value }",
    ":= json.filter($p, [sprintf(\"spec/%s\", [f]) | some f in names])",
    // The type of a value, not its content.
    "if is_array($p.$f)",
    "if is_string($p.$f)",
    "if is_boolean($p.$f)",
    "if is_number($p.$f)",
    "if is_null($p.$f)",
    "if not is_object($p.$f)",
    ":= type_name($p.$f)",
    ":= type_name($p)",
    ":= [type_name($p.$f), count($p.$f)]",
    ":= [type_name($p.$f), $p.$f.app]",
    "if { is_object($p.metadata); $p.metadata.labels.app == \"web\" }",
    "if { is_array($p.spec.containers); $p.spec.containers[_].image == \"i0\" }",
    "if { c := $p.spec.containers; is_array(c); is_object(c[input.index]) }",
    ":= {type_name(x) | some x in $p.$f}",
    ":= type_name({x | some x in $p.spec.containers})",
    ":= [type_name(x) | some x in {x | some x in $p.spec.containers}]",
    "if is_set({x | some x in $p.$f})",
    ":= type_name(object.get($p, [\"spec\", \"hostNetwork\"], null))",
    ":= x if { some x in $p.$f; is_string(x) }",
    ":= {k: type_name(v) | some k, v in $p}",
    // Names may be empty.
    ":= json.filter($p, [\"status//deep\", \"metadata/labels/\"])",
    ":= json.filter($p.$f, [\"\"])",
];
/// Rules whose results conflict. One in three policies has exactly one, since reads of other rules would hide missing
/// fields.
const CONFLICTS: [&str; 7] = [
    ":= h.pod_of(input.value).$f",
    ":= h.pod_of(input.value) == $p",
    ":= h.spec_of(input.value).nodeName",
    ":= h.either($p).name",
    ":= h.by_ip[input.value].$f",
    ":= h.by_app[input.value].$f",
    ":= {k: v | v := $p.spec.containers[_]; k := v.image}[\"i0\"].args",
];
/// Helper rules outside the decisions: only their callers determine the reads.
const LIBRARY: &str = r#"package h

import data.kubernetes.pods

containers(pod) := {c | some kind in ["containers", "initContainers"]; some c in pod.spec[kind]}

running contains pod if some pod in pods.a

known := {labels | labels := pods[_][_].metadata.labels}

pod_of(ip) := pod if { some pod in pods[_]; pod.status.podIP == ip }

spec_of(app) := pod.spec if { some pod in pods[_]; pod.metadata.labels.app == app }

either(pod) := pod.metadata if pod.spec.hostNetwork

either(pod) := pod.status if pod.spec.nodeName

by_ip := {pod.status.podIP: pod | some pod in pods[_]}

by_app[app] := pod if { some pod in pods[_]; app := pod.metadata.labels.app }
"#;
const HELPERS: &str = r#"package t

import data.h
import data.kubernetes.pods

the_pod(_) := pods.a.p0

picked(name) := pods.a[name] if name != "p3"

field(pod) := pod.metadata.labels.app if pod.spec.hostNetwork

field(pod) := pod.status.podIP if not pod.spec.hostNetwork

part(pod) := pod.metadata

pair(pod) := [pod.metadata.labels, pod.status.podIP]

helper := data.other

default shown := "nothing"

shown := input.metadata.labels.app

default fallback := false

labels contains label if { some ns, name; label := pods[ns][name].metadata.labels.app }

by_name[name] contains pod.status.podIP if { some ns; some name, pod in pods[ns] }

nested[ns][name] := true if { some ns; some name, pod in pods[ns]; pod.spec.hostNetwork }

names := ["nodeName", "hostNetwork"]

name_set := {"nodeName", "hostNetwork"}

odd_names := ["nodeName", 1, null, ["hostNetwork"], {"hostNetwork": 1}]

odd_set := {"nodeName", 1, null, ["hostNetwork"], {"hostNetwork": 1}}

the_path := ["spec", "nodeName"]

by_kind := {"app": ["spec", "status"], "key": ["metadata"]}

deep_names[kind] contains name if { some kind in ["app", "key"]; some name in names }

of_field(value, name) := value[name] if is_object(value)

of_field(value, name) := value.spec[name] if is_object(value.spec)

chosen(pod) := pod.spec[input.key]

whole_input(_) := [x | some f in input; x := pods.a.p0.spec[f]]

nodes := [node.spec.zone | some node in data.kubernetes.nodes]
"#;

fn policy(random: &mut fastrand::Rng) -> String {
    let mut text = HELPERS.to_owned();
    let is_alone = random.u8(..3) == 0;
    for nth in 0..if is_alone { 1 } else { RULES } {
        let any = random.usize(..BODIES.len() + CONFLICTS.len());
        let body = match BODIES.get(any).filter(|_| !is_alone) {
            Some(body) => body,
            None => CONFLICTS[any % CONFLICTS.len()],
        };
        // A negation must not contain unbound variables.
        let may_choose = !body.contains("not ");
        let pick = |random: &mut fastrand::Rng, from: &[&'static str]| {
            let from: Vec<_> = from.iter().filter(|text| may_choose || !text.contains("[_]")).collect();
            *from[random.usize(..from.len())]
        };
        let pod = pick(random, &PODS);
        let field = |random: &mut fastrand::Rng| pick(random, &FIELDS);
        let body = body.replace("$f", field(random)).replace("$g", field(random));
        let rule = body.replace("$p", pod);
        let value = rule.strip_prefix(":= ").filter(|_| !rule.contains(" else "));
        // A set, or a single value, which fails for several results.
        let is_set = random.u8(..4) > 0;
        let rule = match value.map(|value| value.rsplit_once(" if ").unwrap_or((value, "true"))) {
            Some((value, "true")) if is_set => format!("\nr{nth} contains value if value := {value}\n"),
            Some((value, condition)) if is_set => format!("\nr{nth} contains {value} if {condition}\n"),
            Some((value, condition)) => format!("\nr{nth} := {value} if {condition}\n"),
            None => format!("\nr{nth} {rule}\n"),
        };
        text.push_str(&rule);
    }
    text
}

fn pods(random: &mut fastrand::Rng) -> Value {
    let word = |random: &mut fastrand::Rng| ["web", "db", "p1", "a", ""][random.usize(..5)];
    let (mut namespaces, mut last) = (json!({}), None);
    for namespace in ["a", "b", "c"] {
        for name in ["p0", "p1", "p2", "p3"] {
            if random.u8(..5) == 0 {
                continue;
            }
            // Replicas differ only in name.
            if let Some(replica) = last.clone().filter(|_| random.bool()) {
                namespaces[namespace][name] = replica;
                namespaces[namespace][name]["metadata"]["name"] = json!(name);
                namespaces[namespace][name]["metadata"]["namespace"] = json!(namespace);
                continue;
            }
            let mut pod = json!({
                "kind": "Pod", "metadata": { "name": name, "namespace": namespace, "uid": word(random) },
                "spec": { "nodeName": word(random) },
            });
            if random.bool() {
                pod["metadata"]["labels"] = json!({ "app": word(random), "key": word(random) });
                if random.u8(..4) == 0 {
                    pod["metadata"]["labels"][""] = json!(word(random));
                }
            }
            if random.u8(..3) == 0 {
                pod["metadata"]["annotations"] = json!({ "a/b": word(random), "web": { "deep": [1] } });
            }
            if random.u8(..4) > 0 {
                for kind in ["containers", "initContainers"] {
                    let container = |random: &mut fastrand::Rng| json!({ "image": format!("i{}", random.u8(..2)), "args": [word(random)] });
                    pod["spec"][kind] = (0..random.usize(..4)).map(|_| container(random)).collect();
                }
            }
            match random.u8(..4) {
                0 => pod["spec"]["hostNetwork"] = json!(true),
                1 => pod["spec"]["hostNetwork"] = json!(false),
                2 => pod["spec"]["hostNetwork"] = json!({ "not": "a bool" }),
                _ => {}
            }
            if random.bool() {
                pod["status"] = json!({ "podIP": word(random), "phase": "Running", "list": [null, 1.50, "web"], "": { "deep": word(random), "x": 1 } });
            }
            last = Some(pod.clone());
            namespaces[namespace][name] = pod;
        }
    }
    namespaces
}

fn input(random: &mut fastrand::Rng) -> Value {
    let pick = |random: &mut fastrand::Rng, from: &[&str]| json!(from[random.usize(..from.len())]);
    let any = |random: &mut fastrand::Rng, from: &[Value]| from[random.usize(..from.len())].clone();
    let odd = json!(["labels", "app", "p1", 0, 1.5, null, ["a", "p0", "metadata"], ["app"], [], {}]);
    let words = json!([["spec", "nodeName"], ["metadata", "labels"], []]);
    json!({
        "ns": pick(random, &["a", "b", "c", "none"]), "name": pick(random, &["p0", "p1", "p2", "p3"]),
        "key": pick(random, &["app", "key", "containers", "labels", "status"]), "index": random.u8(..3),
        "odd": any(random, odd.as_array().unwrap()), "words": any(random, words.as_array().unwrap()),
        "value": pick(random, &["web", "db", "i0", ""]), "path": pick(random, &["status", "spec/containers"]), "table": { "web": 1, "": 2 },
        "labels": { "app": pick(random, &["web", "db"]), "key": pick(random, &["web", "db"]) },
        "container": { "image": pick(random, &["i0", "i1"]), "args": [pick(random, &["web", "db"])] },
    })
}

/// Evaluates the package with the modules in `dir` for each input.
fn decide(opa: &Path, dir: &Path, package: &str, data: &Value) -> Value {
    std::fs::write(dir.join("data.json"), data.to_string()).unwrap();
    let query = format!("[d | some i in data.inputs; d := data.{package} with input as i]");
    let output = Command::new(opa).current_dir(dir).args(["eval", "-d", ".", &query]).output().unwrap();
    let output_text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
    let mut answer: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output_text}"));
    // Conflicting values abort the evaluation, also with whole objects.
    if answer["errors"][0]["code"] == "eval_conflict_error" {
        return json!(vec!["conflict"; data["inputs"].as_array().unwrap().len()]);
    }
    let decisions = answer["result"][0]["expressions"][0]["value"].take();
    assert_eq!(decisions.as_array().map(Vec::len), data["inputs"].as_array().map(Vec::len), "{output_text}");
    decisions
}

/// An OPA with one round's policies, and whole or pruned pods.
struct Decider {
    opa: Opa,
    http: reqwest::Client,
}

impl Decider {
    async fn put(&self, path: &str, body: String) {
        let put = self.http.put(format!("{}/v1/{path}", self.opa.url)).body(body).send().await.unwrap();
        let (status, text) = (put.status(), put.text().await.unwrap());
        assert!(status.is_success(), "{path}: {text}");
    }

    async fn load(&self, text: &str, data: &Value) {
        self.put("policies/h", LIBRARY.to_owned()).await;
        self.put("policies/t", text.to_owned()).await;
        for (name, value) in data.as_object().unwrap() {
            self.put(&format!("data/{name}"), value.to_string()).await;
        }
    }

    /// Returns the decision at `path`, or the error code.
    async fn ask(&self, path: &str, input: &Value) -> Result<Value, String> {
        let body = json!({ "input": input }).to_string();
        let answer = self.http.post(format!("{}/v1/data/{path}", self.opa.url)).body(body).send().await;
        let mut answer: Value = serde_json::from_slice(&answer.unwrap().bytes().await.unwrap()).unwrap();
        match answer["errors"][0]["code"].as_str() {
            Some(code) => Err(code.to_owned()),
            None => Ok(answer["result"].take()),
        }
    }

    /// Returns the decision of each rule, evaluated separately if one fails.
    async fn decide(&self, input: &Value) -> BTreeMap<String, Result<Value, String>> {
        if let Ok(Value::Object(rules)) = self.ask("t", input).await {
            return rules.into_iter().map(|(rule, value)| (rule, Ok(value))).collect();
        }
        let mut rules = BTreeMap::new();
        for rule in (0..RULES).map(|nth| format!("r{nth}")) {
            let decision = self.ask(&format!("t/{rule}"), input).await;
            if decision != Ok(Value::Null) {
                rules.insert(rule, decision);
            }
        }
        rules
    }
}

#[tokio::test]
async fn i7_decisions_on_pruned_and_whole_objects_are_equal() {
    let assets = tokio::task::spawn_blocking(opa_hub_loadtest::lab::assets::folder).await.unwrap().unwrap();
    let compiler = Compiler::find(Some(&assets.join("opa")), Dialect::Default).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let decider = async || {
        let opa = Opa::start(&assets, dir.path(), None, &[]).await.unwrap();
        Decider { opa, http: opa_hub_loadtest::lab::http().unwrap() }
    };
    let (on_whole, on_less) = (decider().await, decider().await);
    let number = |name: &str| std::env::var(name).ok().and_then(|rounds| rounds.parse::<u64>().ok());
    let (first, rounds) =
        (number("OPA_HUB_FIELD_SEED").unwrap_or(0), number("OPA_HUB_FIELD_ROUNDS").unwrap_or(ROUNDS));
    let (mut narrow, mut cases, mut conflicts) = (0u64, 0u64, 0u64);
    for seed in first..first + rounds {
        let random = &mut fastrand::Rng::with_seed(seed);
        let text = policy(random);
        let ids = ["ns/t/t.rego", "ns/h/h.rego"].map(str::to_owned);
        let texts = [&text, LIBRARY].map(|text| Arc::new(Module::read(text).unwrap()));
        let modules = ids.iter().zip(&texts).collect();
        let asked = ["/t".parse().unwrap()];
        let found =
            Analyst::new(Duration::from_secs(60)).reads(&compiler, &modules, &asked).await.unwrap().unwrap();
        assert!(found.opaque.is_empty(), "seed {seed}: {:?}\n{text}", found.opaque);
        let places = ["pods", "nodes"].map(|name| format!("/kubernetes/{name}").parse::<DirPath>().unwrap());
        let masks = FieldMasks::of_reads(&found.reads, places.iter().cloned().zip([Some(false), Some(true)]));
        let [of_pods, of_nodes] = places.each_ref().map(|place| masks.of(place));
        narrow += u64::from(!of_pods.is_all());

        let nodes = json!({ "n1": { "spec": { "zone": "z" }, "status": 1 } });
        let whole = json!({ "kubernetes": { "pods": pods(random), "nodes": nodes }, "other": {} });
        let mut less = whole.clone();
        for namespace in less["kubernetes"]["pods"].as_object_mut().unwrap().values_mut() {
            for pod in namespace.as_object_mut().unwrap().values_mut() {
                *pod = cut(of_pods, pod);
            }
        }
        less["kubernetes"]["nodes"]["n1"] = cut(of_nodes, &less["kubernetes"]["nodes"]["n1"]);
        if !of_nodes.is_all() {
            assert_eq!(less["kubernetes"]["nodes"]["n1"], json!({ "spec": { "zone": "z" } }));
        }
        tokio::join!(on_whole.load(&text, &whole), on_less.load(&text, &less));
        for input in (0..INPUTS).map(|_| input(random)) {
            let (expected, decided) = tokio::join!(on_whole.decide(&input), on_less.decide(&input));
            for (rule, expected) in &expected {
                let decided = decided.get(rule);
                assert_eq!(decided, Some(expected), "seed {seed}, {rule} for {input}\n{masks:?}\n{text}");
                cases += 1;
                conflicts += u64::from(expected.is_err());
            }
            assert_eq!(decided, expected, "seed {seed} for {input}");
        }
    }
    println!(
        "seeds {first} to {}: {cases} decisions agree, {conflicts} of them conflicts; {narrow} of {rounds} policies read \
         less than whole pods",
        first + rounds - 1
    );
    assert!(conflicts > 0 && cases > 10 * rounds && narrow > rounds / 4, "too few cases");
}

/// Policy with a rule that returns a whole pod: only its callers determine the reads.
const HELD: &str = "ns/m/required_labels.rego";
const ASKED: &str = "/corpus/required_labels/violation";

/// I7 for realistic policies, separately and together, on pods from an API server.
#[tokio::test]
async fn i7_realistic_policies_decide_equally_on_pruned_objects() {
    let assets = tokio::task::spawn_blocking(opa_hub_loadtest::lab::assets::folder).await.unwrap().unwrap();
    let opa = assets.join("opa");
    let compiler = Compiler::find(Some(&opa), Dialect::Default).await.unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts = BTreeMap::new();
    for folder in [root.join("tests/corpus"), root.join("../loadtest/policies")] {
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            texts.insert(format!("ns/m/{name}"), Arc::new(Module::read(&text).unwrap()));
        }
    }
    let random = &mut fastrand::Rng::with_seed(1);
    let (kubernetes, inputs) = lived_in(random);
    let place: DirPath = "/kubernetes/pods".parse().unwrap();
    let others = || texts.iter().filter(|(id, _)| *id != HELD);
    let each = texts.iter().map(|(id, module)| BTreeMap::from([(id, module)]));
    for modules in each.chain([others().collect()]) {
        let asked: Vec<DirPath> =
            if modules.contains_key(&HELD.to_owned()) { vec![ASKED.parse().unwrap()] } else { Vec::new() };
        let found =
            Analyst::new(Duration::from_secs(60)).reads(&compiler, &modules, &asked).await.unwrap().unwrap();
        let masks = FieldMasks::of_reads(&found.reads, [(place.clone(), Some(false))]);
        let names: Vec<_> = modules.keys().collect();
        assert!(!masks.of(&place).is_all(), "{names:?} read whole pods");
        let dir = tempfile::tempdir().unwrap();
        for (index, module) in modules.values().enumerate() {
            std::fs::write(dir.path().join(format!("{index}.rego")), &module.text).unwrap();
        }
        let whole = json!({ "kubernetes": kubernetes, "inputs": inputs });
        let less = json!({ "kubernetes": cut_all(&kubernetes, &masks), "inputs": inputs });
        let asked = asked.iter().map(|path| path.relative().replace('/', "."));
        let packages = modules.values().map(|module| module.package());
        let decisions: Vec<_> = if asked.len() > 0 { asked.collect() } else { packages.collect() };
        for package in &decisions {
            let [expected, decided] = [&whole, &less].map(|data| decide(&opa, dir.path(), package, data));
            assert_eq!(decided, expected, "{names:?}");
            let expected = expected.as_array().unwrap();
            assert!(expected.iter().any(|one| *one != expected[0]), "{package} decides always the same");
        }
    }
}

/// `opa-hub fields`.
#[tokio::test]
async fn fields_command_works_without_a_server() {
    let assets = tokio::task::spawn_blocking(opa_hub_loadtest::lab::assets::folder).await.unwrap().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let policy = "package p\n\nallow if data.kubernetes.pods[input.ns][input.name].metadata.labels.app == \"web\"\n\n\
                  zones contains data.kubernetes.nodes[_].spec.zone";
    let write =
        |name: &str, manifest: Value| std::fs::write(dir.path().join(name), manifest.to_string()).unwrap();
    let labels = json!({ "openpolicyagent.org/policy": "rego" });
    write(
        "policy.json",
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": { "p.rego": policy },
            "metadata": { "name": "m", "namespace": "ns", "labels": labels },
        }),
    );
    write(
        "pod.json",
        json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p", "labels": { "app": "web" } } }),
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_opa-hub"));
    command
        .args(["fields", "--replicate=v1/pods", "--replicate-cluster=v1/nodes", "--manifests"])
        .arg(dir.path());
    let output = command.env("OPA_BIN", assets.join("opa")).output().unwrap();
    let output_text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<_> =
        output_text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let pod = r#"{"kind":"Pod","apiVersion":"v1","metadata":{"labels":{"app":"web"},"name":"p"}}"#.len();
    let cut = r#"{"metadata":{"labels":{"app":"web"}}}"#.len();
    let expected = [
        format!("v1/pods: {cut} of {pod} bytes, an OPA of about 40 MB"),
        format!("metadata.labels.app {} ns/m/p.rego:3:10", cut - 2),
        "v1/nodes: 0 of 0 bytes, an OPA of about 40 MB".into(),
        "spec.zone… 0 ns/m/p.rego:5:16".into(),
    ];
    assert_eq!(lines, expected, "{output_text}{}", String::from_utf8_lossy(&output.stderr));
}

/// Returns the pod fields that these modules read for entrypoints `asked`, and the unused modules.
async fn fields_of_pods(compiler: &Compiler, texts: &[&str], asked: &[DirPath]) -> (String, Vec<String>) {
    let texts: Vec<_> = (0..)
        .zip(texts)
        .map(|(index, text)| (format!("ns/m/{index}"), Module::read(text).unwrap()))
        .collect();
    let texts: Vec<_> = texts.into_iter().map(|(id, module)| (id, Arc::new(module))).collect();
    let modules = texts.iter().map(|(id, module)| (id, module)).collect();
    let found =
        Analyst::new(Duration::from_secs(60)).reads(compiler, &modules, asked).await.unwrap().unwrap();
    let is_refused = |reason: &String| reason.contains("used as reference, not called");
    assert!(found.opaque.values().all(is_refused) && found.left.is_empty(), "{:?}", found.opaque);
    let pods: DirPath = "/kubernetes/pods".parse().unwrap();
    let masks = FieldMasks::of_reads(&found.reads, [(pods.clone(), Some(false))]);
    (masks.of(&pods).to_string(), found.unused.into_iter().collect())
}

/// Pins the fields of each construct against lost precision.
#[tokio::test]
async fn constructs_read_only_named_fields() {
    let assets = tokio::task::spawn_blocking(opa_hub_loadtest::lab::assets::folder).await.unwrap().unwrap();
    let compiler = Compiler::find(Some(&assets.join("opa")), Dialect::Default).await.unwrap();
    let library = "fields := [\"nodeName\", \"schedulerName\"]\n\nkinds := {\"Pod\": fields}\n\n\
                   of(value, name) := value[name]\n\n\
                   p := data.kubernetes.pods[input.ns][input.name] if input.asks_for_pods\n";
    for (body, expected) in [
        (
            "object.get(data.kubernetes.pods, [input.ns, input.name, \"status\", \"podIP\"], \"\") == \"x\"",
            "status.podIP\n",
        ),
        ("object.get(p, [\"metadata\", \"labels\", input.key], \"\") == \"x\"", "metadata.labels[*]\n"),
        ("{ path := [\"status\", \"podIP\"]; object.get(p, path, \"\") == \"x\" }", "status.podIP\n"),
        ("object.get(object.get(p, \"spec\", {}), \"nodeName\", \"\") == \"x\"", "spec.nodeName\n"),
        // The key may be a path.
        ("object.get(object.get(data.kubernetes.pods, input.ns, {}), input.name, {}).kind == \"x\"", "…\n"),
        ("object.get(p.spec, input.key, \"\") == \"x\"", "spec…\n"),
        (
            "{ some f in [\"nodeName\", \"schedulerName\"]; p.spec[f] == \"x\" }",
            "spec.nodeName\nspec.schedulerName\n",
        ),
        (
            "{ some f in {\"nodeName\", \"schedulerName\"}; p.spec[f] == \"x\" }",
            "spec.nodeName\nspec.schedulerName\n",
        ),
        ("{ some f in fields; p.spec[f] == \"x\" }", "spec.nodeName\nspec.schedulerName\n"),
        ("{ some f in kinds[input.kind]; p.spec[f] == \"x\" }", "spec.nodeName\nspec.schedulerName\n"),
        ("{ {\"nodeName\"}[f]; p.spec[f] == \"x\" }", "spec.nodeName\n"),
        ("{ some f in fields; object.get(p.spec, f, \"\") == \"x\" }", "spec.nodeName\nspec.schedulerName\n"),
        ("of(p.spec, \"nodeName\") == \"x\"", "spec.nodeName\n"),
        ("{ some f in array.concat(fields, [\"a\"]); p.spec[f] == \"x\" }", "spec[*]\n"),
        ("{ some f in [\"nodeName\", input.key]; p.spec[f] == \"x\" }", "spec[*]\n"),
        ("is_object(p.spec)", "spec\n"),
        ("type_name(p.spec.containers) == \"array\"", "spec.containers\n"),
        ("{ is_object(p.spec); p.spec.nodeName == \"x\" }", "spec.nodeName\n"),
    ] {
        let text = format!("package t\n\n{library}\nallow if {body}\n");
        let asked = ["/t/allow".parse().unwrap()];
        let (fields, _) = fields_of_pods(&compiler, &[&text], &asked).await;
        assert_eq!(fields, expected, "{body}");
    }
}

/// Annotated entrypoints are added to those of flags and documents.
#[tokio::test]
async fn annotations_add_entrypoints() {
    let assets = tokio::task::spawn_blocking(opa_hub_loadtest::lab::assets::folder).await.unwrap().unwrap();
    let compiler = Compiler::find(Some(&assets.join("opa")), Dialect::Default).await.unwrap();
    let entrypoint = "# METADATA\n# entrypoint: true\n";
    let pod = "pod := data.kubernetes.pods[input.ns][input.name]\n";
    let annotated = |above_package: &str, above_rule: &str| {
        format!(
            "{above_package}package a\n\n{pod}\n{above_rule}allow if pod.spec.nodeName == \"x\"\n\nuser := [allow, pod]\n"
        )
    };
    let (none, rule, package) = (annotated("", ""), annotated("", entrypoint), annotated(entrypoint, ""));
    let document = annotated("", &entrypoint.replace("METADATA\n", "METADATA\n# scope: document\n"));
    let only_a_word = annotated("# entrypoint: true\n", "");
    let [none, rule, package, document, only_a_word] =
        [&none, &rule, &package, &document, &only_a_word].map(String::as_str);
    let other = "package b[\"c-d\"]\n\nlabels := data.kubernetes.pods[_][_].metadata.labels.app\n";
    let uses = "package b\n\nimport data.a\n\nx := a.user\n";
    let phase = "package c\n\nx := data.kubernetes.pods[_][_].status.phase\n";
    let nodes = "package c\n\nx := data.kubernetes.nodes[_].spec.zone\n";
    let authz = "package system.authz\n\nallow if data.kubernetes.pods[_][_].status.phase == \"x\"\n";
    let function = &format!("package f\n\n{entrypoint}f(x) := x\n");
    let with_phase = "spec.nodeName\nstatus.phase…\n";
    for (texts, asked, expected, unused) in [
        (vec![none], None, "…\n", &[][..]),
        (vec![only_a_word], None, "…\n", &[]),
        (vec![rule], None, "spec.nodeName\n", &[]),
        (vec![document], None, "spec.nodeName\n", &[]),
        (vec![package], None, "…\n", &[]),
        // An entrypoint covers all modules; modules that only use it are no entrypoints.
        (vec![rule, other, uses], None, "spec.nodeName\n", &["ns/m/1", "ns/m/2"]),
        (vec![rule, phase], Some("/c/x"), with_phase, &[]),
        (vec![none, phase], Some("/c/x"), "status.phase…\n", &[]),
        // OPA evaluates these by default.
        (vec![rule, authz], None, "spec.nodeName\nstatus.phase\n", &[]),
        (vec![authz, none, nodes], Some("/c/x"), "status.phase\n", &[]),
        // OPA cannot plan an annotated function.
        (vec![rule, function, nodes], Some("/c/x"), "…\n", &[]),
    ] {
        let asked: Vec<DirPath> = asked.iter().map(|path| path.parse().unwrap()).collect();
        let found = fields_of_pods(&compiler, &texts, &asked).await;
        let unused: Vec<_> = unused.iter().map(ToString::to_string).collect();
        assert_eq!(found, (expected.to_owned(), unused), "{texts:?}");
    }
}

/// Twelve levels of six names are 6¹² references.
fn multiplying(first: &str) -> String {
    let names =
        |index: usize| ["a", "b", "c", "d", "e", "f"].map(|name| format!("x{index}.{name}")).join(", ");
    let levels: Vec<_> =
        (0..12).map(|index| format!("\tsome x{} in [{}]\n", index + 1, names(index))).collect();
    format!("package multiplies\n\nallow if {{\n\tx0 := {first}\n{}\tx12 == 1\n}}\n", levels.concat())
}

/// An unanalysable package does not reduce the precision of others.
#[tokio::test]
async fn unanalysable_package_reads_named_data_deep() {
    let assets = tokio::task::spawn_blocking(opa_hub_loadtest::lab::assets::folder).await.unwrap().unwrap();
    let compiler = Compiler::find(Some(&assets.join("opa")), Dialect::Default).await.unwrap();
    let deep: Vec<_> =
        (0..45).map(|index| format!("\tsome x{index} in data.kubernetes.nodes[_].spec.taints\n")).collect();
    let deep = format!("package deep\n\nallow if {{\n{}}}\n", deep.concat());
    let names = |index: usize| {
        ["a", "b", "c", "d", "e", "f", "g", "h"].map(|name| format!("x{index}.{name}")).join(", ")
    };
    let rule = |index: usize| {
        let levels: Vec<_> =
            (0..3).map(|index| format!("\tsome x{} in [{}]\n", index + 1, names(index))).collect();
        let levels = levels.concat();
        format!("g{index} := x3 if {{\n\tx0 := data.kubernetes.nodes.n1.r{index}\n{levels}}}\n")
    };
    let nested = format!(
        "package nested\n\nf(_) := 1\n\n{}\nallow if {{\n\txs := [[[{}]]]\n{}}}\n",
        (0..8).map(rule).collect::<Vec<_>>().concat(),
        (0..8).map(|index| format!("g{index}")).collect::<Vec<_>>().join(", "),
        "\tf(xs)\n".repeat(2000)
    );
    let dynamic = format!(
        "{}\ndeny if {{\n\tsome k in [\"kubernetes\"]\n\tdata[k].pods.a.p.spec\n}}\n",
        multiplying("data.kubernetes.nodes.n1")
    );
    let names_of_nested: String = (0..8)
        .flat_map(|index| ["a", "b", "c", "d", "e", "f", "g", "h"].map(|name| format!("r{index}.{name}…\n")))
        .collect();
    for (text, opaque, of_nodes) in [
        (nested, vec!["/nested"], names_of_nested.as_str()),
        (dynamic, vec!["/multiplies"], "…\n"),
        (multiplying("data.kubernetes.nodes.n1"), vec!["/multiplies"], "a…\nb…\nc…\nd…\ne…\nf…\n"),
        (multiplying("input"), vec![], ""),
        (deep, vec!["/deep"], "…\n"),
        ("package opahub_entry\n\np0 := 1\n".to_owned(), vec![], ""),
        ("package opahub_entry\n\np0 := data.kubernetes.nodes.n1.spec.zone\n".to_owned(), vec![], "spec.zone…\n"),
        (
            // OPA compiles but cannot plan this.
            "package roles_of\n\nroles[x].q := 1 if some x in [\"foo\"]\n\nroles[x].r := 2 if {\n\tsome x in \
             [\"foo\"]\n\troles[\"foo\"].q\n\tdata.kubernetes.nodes[x]\n}\n"
                .to_owned(),
            vec!["/roles_of"],
            "…\n",
        ),
    ] {
        let good = "package good\n\nallow if data.kubernetes.pods.a[_].metadata.labels.app == \"web\"\n";
        let texts = [good, &text].map(|text| Arc::new(Module::read(text).unwrap()));
        let ids = ["ns/good/p.rego", "ns/bad/p.rego"].map(str::to_owned);
        let modules = ids.iter().zip(&texts).collect();
        let started = Instant::now();
        let found = Analyst::new(Duration::from_secs(60)).reads(&compiler, &modules, &[]).await.unwrap().unwrap();
        let took = started.elapsed();
        let decisions: Vec<_> = found.opaque.keys().map(DirPath::as_str).collect();
        assert_eq!(decisions, opaque, "{:?}\n{text}", found.opaque);
        // Bound for a debug build with concurrent tests.
        assert!(took < Duration::from_secs(20), "{took:?} for\n{text}");
        let [pods, nodes] = ["pods", "nodes"].map(|name| format!("/kubernetes/{name}").parse::<DirPath>().unwrap());
        let places = [(pods.clone(), Some(false)), (nodes.clone(), Some(true))];
        let masks = FieldMasks::of_reads(&found.reads, places);
        // `data[k]` names no resource.
        let of_pods = if text.contains("data[k]") { "…\n" } else { "metadata.labels.app\n" };
        assert_eq!(masks.of(&pods).to_string(), of_pods, "{text}");
        assert_eq!(masks.of(&nodes).to_string(), of_nodes, "{text}");
    }
}

/// `opa deps` omits data at a path with packages below; the text contains it.
#[tokio::test]
async fn unanalysable_package_reads_data_next_to_packages_deep() {
    let assets = tokio::task::spawn_blocking(opa_hub_loadtest::lab::assets::folder).await.unwrap().unwrap();
    let compiler = Compiler::find(Some(&assets.join("opa")), Dialect::Default).await.unwrap();
    for reader in ["data.kubernetes[input.kind]", "k[input.kind]"] {
        let bad = multiplying("data.other.n1").replacen(
            "\n\n",
            &format!("\n\nimport data.kubernetes as k\n\ndeny if {reader}.n1.spec == 1\n\nused if k.admission.x\n\n"),
            1,
        );
        let texts = ["package kubernetes.admission\n\nx := 1\n", &bad]
            .map(|text| Arc::new(Module::read(text).unwrap()));
        let ids = ["ns/good/p.rego", "ns/bad/p.rego"].map(str::to_owned);
        let modules = ids.iter().zip(&texts).collect();
        let mut analyst = Analyst::new(Duration::from_secs(60));
        let found = analyst.reads(&compiler, &modules, &[]).await.unwrap().unwrap();
        assert_eq!(found.opaque.keys().map(DirPath::as_str).collect::<Vec<_>>(), ["/multiplies"], "{bad}");
        let nodes: DirPath = "/kubernetes/nodes".parse().unwrap();
        let masks = FieldMasks::of_reads(&found.reads, [(nodes.clone(), Some(true))]);
        assert!(masks.of(&nodes).is_all(), "{masks:?}\n{bad}");
        let names =
            analyst.names(&compiler, &modules, &"/kubernetes".parse().unwrap()).await.unwrap().unwrap();
        assert!(names.is_dynamic, "{names:?}\n{bad}");
    }
}
