//! I7 for common policy idioms in `tests/idioms`: decisions on pruned and whole objects are equal. The table in
//! docs/fields.md compares the analysis with a human reading.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use opa_hub::fields::mask::FieldMask;
use opa_hub::fields::masks::FieldMasks;
use opa_hub::policy::check::{Compiler, Dialect};
use opa_hub::policy::dataflow::ReadDepth;
use opa_hub::policy::modules::Module;
use opa_hub::policy::reads::Analyst;
use opa_hub_loadtest::lab::opa::Opa;
use opa_hub_proto::path::DirPath;
use reqwest::Method;
use serde_json::{Value, json};

use crate::lived_in::{RESOURCES, cut_all, lived_in, objects, place};

/// Path of the page with the table, relative to the crate.
const PAGE: &str = "../docs/fields.md";
const BEGIN: &str = "<!-- table: cargo test -p opa-hub --test it idioms -->\n";
const END: &str = "<!-- end of table -->";
/// Environment variable that rewrites the table.
const REWRITE: &str = "OPA_HUB_WRITE_TABLES";

struct Idiom {
    file: String,
    /// `# Idiom:`
    phrase: String,
    /// `# Asked:`, or the package.
    asked: Vec<DirPath>,
    /// `# Reads:`
    read: FieldMasks,
    module: Arc<Module>,
}

impl Idiom {
    fn parse(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        let comment = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
        let module = Module::read(&text).unwrap();
        let asked = comment("# Asked: ").unwrap_or(module.root.as_str());
        Self {
            file: path.file_name().unwrap().to_str().unwrap().to_owned(),
            phrase: comment("# Idiom: ").unwrap().to_owned(),
            asked: asked.split(' ').map(|path| path.parse().unwrap()).collect(),
            read: parse_fields(comment("# Reads: ").unwrap()),
            module: Arc::new(module),
        }
    }

    /// Returns the field masks for this policy alone.
    async fn sent(&self, compiler: &Compiler) -> FieldMasks {
        let is_annotated = self.module.text.contains("# entrypoint: true");
        let entrypoints: &[DirPath] = if is_annotated { &[] } else { &self.asked[..] };
        let id = format!("ns/m/{}", self.file);
        let modules = BTreeMap::from([(&id, &self.module)]);
        let mut analyst = Analyst::new(Duration::from_secs(60));
        let found = analyst.reads(compiler, &modules, entrypoints).await.unwrap().unwrap();
        assert!(found.opaque.is_empty(), "{id}: {:?}", found.opaque);
        FieldMasks::of_reads(
            &found.reads,
            RESOURCES.map(|(name, is_cluster)| (place(name), Some(is_cluster))),
        )
    }
}

/// Parses fields separated by spaces. Fields of resources other than pods start with `resource:`.
fn parse_fields(text: &str) -> FieldMasks {
    let mut places: BTreeMap<DirPath, FieldMask> = BTreeMap::new();
    for path in text.split(' ') {
        let (resource, path) = path.split_once(':').unwrap_or(("pods", path));
        let (path, extent) = match path.strip_suffix('…') {
            Some(path) => (path, ReadDepth::Whole),
            None => (path, ReadDepth::Shallow),
        };
        let fields = places.entry(place(resource)).or_default();
        for (steps, _) in FieldMask::parse([path]).unwrap().paths() {
            fields.insert(&steps, extent);
        }
    }
    FieldMasks::new(places, FieldMask::default())
}

fn print_fields(masks: &FieldMasks) -> String {
    let mut fields = Vec::new();
    for (resource, _) in RESOURCES {
        let prefix = if resource == "pods" { String::new() } else { format!("{resource}:") };
        let printed = masks.of(&place(resource)).to_string();
        fields.extend(printed.lines().map(|path| format!("`{prefix}{path}`")));
    }
    fields.join(" ")
}

struct Decider {
    opa: Opa,
    http: reqwest::Client,
}

impl Decider {
    async fn send(&self, method: Method, path: &str, body: &Value) -> Value {
        let request = self.http.request(method, format!("{}/v1/{path}", self.opa.url)).body(body.to_string());
        let answer = request.send().await.unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "{path}: {text}");
        // Responses to writes are empty.
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// Returns a list per input, empty if the decision is undefined.
    async fn decide(&self, idiom: &Idiom) -> Vec<Value> {
        let name = |path: &DirPath| path.relative().replace('/', ".");
        let decision = |path: &DirPath| format!("[v | v := data.{} with input as i]", name(path));
        let decisions: Vec<_> = idiom.asked.iter().map(decision).collect();
        let query = format!("x := [d | some i in data.inputs; d := [{}]]", decisions.join(", "));
        let mut answer = self.send(Method::POST, "query", &json!({ "query": query })).await;
        serde_json::from_value(answer["result"][0]["x"].take()).unwrap()
    }

    /// Compares decisions on both kinds of fields with decisions on whole objects. Returns the table row, and whether
    /// the hub sends at most a tenth more than a human reading needs.
    async fn check(
        &self,
        compiler: &Compiler,
        idiom: &Idiom,
        whole: &Value,
        expected: &[Value],
    ) -> (String, bool) {
        let Idiom { file, phrase, read, .. } = idiom;
        assert!(expected.iter().any(|one| *one != expected[0]), "{file} always makes the same decision");
        let sent = idiom.sent(compiler).await;
        let is_used =
            |name: &str| [read, &sent].iter().any(|masks| *masks.of(&place(name)) != FieldMask::default());
        let mut bytes = [0; 2];
        for (bytes, masks) in bytes.iter_mut().zip([read, &sent]) {
            let mut less = cut_all(whole, masks);
            self.send(Method::PUT, "data/kubernetes", &less).await;
            assert_eq!(self.decide(idiom).await, expected, "{file} on {}", print_fields(masks));
            *bytes = bytes_a_pod(&mut less, is_used);
        }
        let [of_read, of_sent] = bytes;
        let ratio = of_sent as f64 / of_read as f64;
        let fields = print_fields(&sent);
        let row = format!(
            "| [{phrase}](../hub/tests/idioms/{file}) | {of_read} | {of_sent} | {ratio:.1} | {fields} |\n"
        );
        (row, of_sent * 10 <= of_read * 11)
    }
}

/// Bytes of these resources' objects per pod.
fn bytes_a_pod(kubernetes: &mut Value, is_used: impl Fn(&str) -> bool) -> usize {
    let (mut bytes, mut pods) = (0, 0);
    for (resource, is_cluster_scoped) in RESOURCES {
        let objects = objects(kubernetes, resource, is_cluster_scoped);
        if resource == "pods" {
            pods = objects.len();
        }
        if is_used(resource) {
            bytes += objects.iter().map(|object| object.to_string().len()).sum::<usize>();
        }
    }
    bytes / pods
}

#[tokio::test]
async fn i7_idioms_decide_equally_on_pruned_objects() {
    let assets = tokio::task::spawn_blocking(opa_hub_loadtest::lab::assets::folder).await.unwrap().unwrap();
    let compiler = Compiler::find(Some(&assets.join("opa")), Dialect::Default).await.unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join("tests/idioms");
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort_unstable();
    let idioms: Vec<_> = files.iter().map(|path| Idiom::parse(path)).collect();

    let dir = tempfile::tempdir().unwrap();
    let opa = Opa::start(&assets, dir.path(), None, &[folder.to_str().unwrap()]).await.unwrap();
    let decider = Decider { opa, http: opa_hub_loadtest::lab::http().unwrap() };
    let (mut whole, inputs) = lived_in(&mut fastrand::Rng::with_seed(1));
    decider.send(Method::PUT, "data/inputs", &json!(inputs)).await;
    decider.send(Method::PUT, "data/kubernetes", &whole).await;
    let mut expected = Vec::new();
    for idiom in &idioms {
        let decisions = decider.decide(idiom).await;
        assert_eq!(decisions.len(), inputs.len(), "{}", idiom.file);
        expected.push(decisions);
    }
    let (mut rows, mut exact) = (String::new(), 0);
    for (idiom, expected) in idioms.iter().zip(&expected) {
        let (row, is_exact) = decider.check(&compiler, idiom, &whole, expected).await;
        rows.push_str(&row);
        exact += usize::from(is_exact);
    }

    let mut table = String::new();
    let all = bytes_a_pod(&mut whole, |resource| resource == "pods");
    writeln!(
        table,
        "A whole pod has {all} bytes. For {exact} of {} idioms the hub sends what a person reads, or up to a tenth more.\n",
        idioms.len()
    )
    .unwrap();
    table.push_str("| idiom | a person reads, bytes | sent, bytes | ratio | fields that are sent |\n");
    table.push_str("|---|--:|--:|--:|---|\n");
    table.push_str(&rows);
    let page = std::fs::read_to_string(root.join(PAGE)).unwrap();
    let (before, rest) = page.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let written = format!("{before}{BEGIN}\n{table}\n{END}{after}");
    if std::env::var_os(REWRITE).is_some() {
        std::fs::write(root.join(PAGE), written).unwrap();
    } else {
        let command = format!("{REWRITE}=1 cargo test -p opa-hub --test it idioms");
        assert!(written == page, "table in docs/fields.md is outdated; rewrite with {command}\n{table}");
    }
}
