//! I7: what policies decide on objects cut down to the fields that the analysis found equals what they decide on whole
//! objects, in a real OPA, for generated policies, objects and inputs.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use opa_hub::bundle::fields::Fields;
use opa_hub::bundle::kept::Kept;
use opa_hub::policy::analyze;
use opa_hub::policy::check::{Compiler, Dialect};
use opa_hub::policy::modules::Module;
use opa_hub_loadtest::pods::Nth;
use opa_hub_proto::path::DirPath;
use serde_json::{Value, json};

/// Rounds, each of other rules, fields, objects and inputs. `OPA_HUB_FIELD_ROUNDS` asks for more.
const ROUNDS: u64 = 120;
/// Rules of one policy: few, or some of them would always read everything.
const RULES: usize = 4;
const INPUTS: usize = 12;

/// Places that hold a pod. `$f` and `$g` in the rules are fields of it.
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
/// Every construct that the analysis claims to follow, and every one that it must give up on. Each body is a rule's.
const BODIES: [&str; 53] = [
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
];
const HELPERS: &str = r#"package t

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

nodes := [node.spec.zone | some node in data.kubernetes.nodes]
"#;

fn policy(random: &mut fastrand::Rng) -> String {
    let mut text = HELPERS.to_owned();
    for _ in 0..RULES {
        let at = random.usize(..BODIES.len());
        let body = BODIES[at];
        // Under a negation nothing may be left to choose.
        let may_choose = !body.contains("not ");
        let pick = |random: &mut fastrand::Rng, from: &[&'static str]| {
            let from: Vec<_> = from.iter().filter(|text| may_choose || !text.contains("[_]")).collect();
            *from[random.usize(..from.len())]
        };
        let pod = pick(random, &PODS);
        let field = |random: &mut fastrand::Rng| pick(random, &FIELDS);
        let body = body.replace("$f", field(random)).replace("$g", field(random));
        // A set of what the rule may be: several pods would be a conflict else.
        let rule = body.replace("$p", pod);
        let value = rule.strip_prefix(":= ").filter(|_| !rule.contains(" else "));
        let rule = match value.map(|value| value.split_once(" if ").unwrap_or((value, "true"))) {
            Some((value, "true")) => format!("\nr{at} contains value if value := {value}\n"),
            Some((value, condition)) => format!("\nr{at} contains {value} if {condition}\n"),
            None => format!("\nr{at} {rule}\n"),
        };
        text.push_str(&rule);
    }
    text
}

fn pods(random: &mut fastrand::Rng) -> Value {
    let word = |random: &mut fastrand::Rng| ["web", "db", "p1", "a", ""][random.usize(..5)];
    let mut namespaces = json!({});
    for namespace in ["a", "b", "c"] {
        for name in ["p0", "p1", "p2", "p3"] {
            if random.u8(..5) == 0 {
                continue;
            }
            let mut pod = json!({
                "kind": "Pod", "metadata": { "name": name, "namespace": namespace, "uid": word(random) },
                "spec": { "nodeName": word(random) },
            });
            if random.bool() {
                pod["metadata"]["labels"] = json!({ "app": word(random), "key": word(random) });
            }
            if random.u8(..3) == 0 {
                pod["metadata"]["annotations"] = json!({ "a/b": word(random), "web": { "deep": [1] } });
            }
            if random.u8(..4) > 0 {
                let count = random.usize(..3);
                let container = |at: usize| json!({ "image": format!("i{at}"), "args": [word(random)] });
                pod["spec"]["containers"] = (0..count).map(container).collect();
            }
            match random.u8(..4) {
                0 => pod["spec"]["hostNetwork"] = json!(true),
                1 => pod["spec"]["hostNetwork"] = json!(false),
                2 => pod["spec"]["hostNetwork"] = json!({ "not": "a bool" }),
                _ => {}
            }
            if random.bool() {
                pod["status"] =
                    json!({ "podIP": word(random), "phase": "Running", "list": [null, 1.50, "web"] });
            }
            namespaces[namespace][name] = pod;
        }
    }
    namespaces
}

fn input(random: &mut fastrand::Rng) -> Value {
    let pick = |random: &mut fastrand::Rng, from: &[&str]| json!(from[random.usize(..from.len())]);
    json!({
        "ns": pick(random, &["a", "b", "c", "none"]), "name": pick(random, &["p0", "p1", "p2", "p3"]),
        "key": pick(random, &["app", "key", "containers", "labels", "status"]), "index": random.u8(..3),
        "value": pick(random, &["web", "db", "i0", ""]), "path": pick(random, &["status", "spec/containers"]), "table": { "web": 1, "": 2 },
    })
}

/// What the package decides for each input, by the modules in `dir`.
fn decide(opa: &Path, dir: &Path, package: &str, data: &Value) -> Value {
    std::fs::write(dir.join("data.json"), data.to_string()).unwrap();
    let query = format!("[d | some i in data.inputs; d := data.{package} with input as i]");
    let output = Command::new(opa).current_dir(dir).args(["eval", "-d", ".", &query]).output().unwrap();
    let said = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
    let mut answer: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    // Two values for one key end the whole evaluation: they do so beside whole objects too.
    if answer["errors"][0]["code"] == "eval_conflict_error" {
        return json!(vec!["conflict"; data["inputs"].as_array().unwrap().len()]);
    }
    let decisions = answer["result"][0]["expressions"][0]["value"].take();
    assert_eq!(decisions.as_array().map(Vec::len), data["inputs"].as_array().map(Vec::len), "{said}");
    decisions
}

fn cut(fields: &Fields, object: &Value) -> Value {
    let mut out = Vec::new();
    fields.cut(&object.to_string(), &mut out).unwrap();
    serde_json::from_slice(&out).unwrap()
}

#[tokio::test]
async fn i7_decisions_on_fields_equal_decisions_on_whole_objects() {
    let assets = tokio::task::spawn_blocking(opa_hub_loadtest::lab::assets::folder).await.unwrap().unwrap();
    let opa = assets.join("opa");
    let compiler = Compiler::find(Some(&opa), Dialect::Default).await.unwrap();
    let rounds =
        std::env::var("OPA_HUB_FIELD_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS);
    let (mut narrow, mut cases) = (0u64, 0u64);
    for seed in 0..rounds {
        let random = &mut fastrand::Rng::with_seed(seed);
        let text = policy(random);
        let (id, module) = ("ns/t/t.rego".to_owned(), Arc::new(Module::read(&text).unwrap()));
        let modules = BTreeMap::from([(&id, &module)]);
        let plan =
            compiler.plan(&modules, &[]).await.unwrap_or_else(|error| panic!("{error}\n{text}")).unwrap();
        let reads = analyze::reads(&plan);
        let places = ["pods", "nodes"].map(|name| format!("/kubernetes/{name}").parse::<DirPath>().unwrap());
        let kept = Kept::of_reads(&reads, places.iter().cloned().zip([Some(false), Some(true)]));
        let [of_pods, of_nodes] = places.each_ref().map(|place| kept.of(place));
        narrow += u64::from(!of_pods.is_all());

        let inputs: Vec<_> = (0..INPUTS).map(|_| input(random)).collect();
        let nodes = json!({ "n1": { "spec": { "zone": "z" }, "status": 1 } });
        let whole =
            json!({ "kubernetes": { "pods": pods(random), "nodes": nodes }, "inputs": inputs, "other": {} });
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
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("t.rego"), &text).unwrap();
        let (expected, decided) =
            (decide(&opa, dir.path(), "t", &whole), decide(&opa, dir.path(), "t", &less));
        for (at, (expected, decided)) in
            expected.as_array().unwrap().iter().zip(decided.as_array().unwrap()).enumerate()
        {
            for (rule, expected) in expected.as_object().into_iter().flatten() {
                assert_eq!(
                    &decided[rule], expected,
                    "seed {seed}, {rule} for {}\n{kept:?}\n{text}",
                    whole["inputs"][at]
                );
                cases += 1;
            }
            assert_eq!(decided, expected, "seed {seed}");
        }
    }
    println!("{cases} decisions, {narrow} of {rounds} policies read less than whole pods");
    assert!(cases > 2000 && narrow > rounds / 3, "{cases} decisions, {narrow} policies");
}

/// A policy with a rule that is a whole pod, for its others to use: only what is asked of it tells what it reads.
const HELD: &str = "ns/m/required_labels.rego";
const ASKED: &str = "/corpus/required_labels/violation";

/// I7: so it is for policies as people write them, each by itself and all together, on pods as an API server serves
/// them.
#[tokio::test]
async fn i7_policies_from_life_decide_the_same() {
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
    let (pods, inputs) = lived_in(random);
    let place: DirPath = "/kubernetes/pods".parse().unwrap();
    let others = || texts.iter().filter(|(id, _)| *id != HELD);
    let each = texts.iter().map(|(id, module)| BTreeMap::from([(id, module)]));
    for modules in each.chain([others().collect()]) {
        let asked: Vec<DirPath> =
            if modules.contains_key(&HELD.to_owned()) { vec![ASKED.parse().unwrap()] } else { Vec::new() };
        let plan = compiler.plan(&modules, &asked).await.unwrap().unwrap();
        let kept = Kept::of_reads(&analyze::reads(&plan), [(place.clone(), Some(false))]);
        let names: Vec<_> = modules.keys().collect();
        assert!(!kept.of(&place).is_all(), "{names:?} read whole pods");
        let dir = tempfile::tempdir().unwrap();
        for (at, module) in modules.values().enumerate() {
            std::fs::write(dir.path().join(format!("{at}.rego")), &module.text).unwrap();
        }
        let whole = json!({ "kubernetes": { "pods": pods }, "inputs": inputs });
        let mut less = whole.clone();
        for pod in less["kubernetes"]["pods"].as_object_mut().unwrap().values_mut().flat_map(members) {
            *pod = cut(kept.of(&place), pod);
        }
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

fn members(value: &mut Value) -> impl Iterator<Item = &mut Value> {
    value.as_object_mut().unwrap().values_mut()
}

/// Pods as they are served, some of them odd, and questions about them.
fn lived_in(random: &mut fastrand::Rng) -> (Value, Vec<Value>) {
    let (mut pods, mut inputs) = (json!({}), Vec::new());
    for nth in (0..12).chain(300..304).map(Nth) {
        let mut pod = nth.served();
        match random.u8(..6) {
            0 => pod["metadata"]["labels"] = json!({ "app": "Odd", "team": 1 }),
            1 => pod["spec"]["containers"][0]["securityContext"] = json!({ "privileged": true }),
            2 => pod["spec"]["initContainers"] = json!([{ "name": "init", "image": "other/init:latest" }]),
            3 => pod["status"] = json!({ "phase": "Pending", "podIP": Nth(0).address() }),
            4 => _ = pod["metadata"].as_object_mut().unwrap().remove("ownerReferences"),
            _ => pod["spec"]["containers"][1]["resources"]["limits"] = json!({ "cpu": "2", "memory": "1Gi" }),
        }
        pods[nth.namespace()][nth.name()] = pod;
        let of = |nth: Nth| json!({ "namespace": nth.namespace(), "name": nth.name() });
        for role in ["read", "write", "reader"] {
            let other = Nth(random.usize(..12));
            inputs.push(json!({
                "namespace": nth.namespace(), "pod": nth.name(), "source": other.address(), "role": role,
                "from": of(nth), "to": of(other), "registry": if role == "read" { "other/" } else { "registry.example.com/" }, "destination": nth.address(),
            }));
        }
    }
    (pods, inputs)
}

/// `opa-hub fields`, as people run it.
#[tokio::test]
async fn fields_are_shown_without_a_server() {
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
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<_> =
        said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let pod = r#"{"kind":"Pod","apiVersion":"v1","metadata":{"labels":{"app":"web"},"name":"p"}}"#.len();
    let cut = r#"{"metadata":{"labels":{"app":"web"}}}"#.len();
    let expected = [
        format!("v1/pods: {cut} of {pod} bytes, an OPA of about 40 MB"),
        format!("metadata.labels.app {} ns/m/p.rego:3:10", cut - 2),
        "v1/nodes: 0 of 0 bytes, an OPA of about 40 MB".into(),
        "spec.zone… 0 ns/m/p.rego:5:16".into(),
    ];
    assert_eq!(lines, expected, "{said}{}", String::from_utf8_lossy(&output.stderr));
}
