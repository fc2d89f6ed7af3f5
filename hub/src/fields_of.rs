//! `opa-hub fields`: which fields of replicated objects the policies of a folder read, without a server.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, bail};

use crate::bundle::fields::Fields;
use crate::bundle::kept::Kept;
use crate::bundle::project::Projection;
use crate::bundle::view::Batch;
use crate::config::{Config, Selection, Source};
use crate::model::{Change, Content, Feed, FeedId, Scope};
use crate::policy::analyze::{self, Extent, Reads, Step};
use crate::policy::check::Compiler;
use crate::policy::settle::settle;
use crate::source::folder::{self, Contents};

/// The report, for people: by resource what is read and by whom, and how many bytes that leaves.
pub async fn report(config: &Config) -> anyhow::Result<String> {
    let Source::Folder(dir) = &config.source else {
        bail!("give --manifests DIR: a cluster is not read for this")
    };
    let replicated: Vec<(FeedId, &Feed)> = (0..).map(FeedId).zip(&config.feeds).collect();
    let compiler = Compiler::find(config.rego.opa.as_deref(), config.rego.dialect).await?;
    let Contents { objects, mut problems } = folder::read_once(dir, &config.feeds)?;

    let mut projection =
        Projection::new(config.feeds.clone(), config.rego.test_label.clone(), Kept::default());
    let mut batch = Batch::default();
    for (id, object) in objects.iter().filter(|(id, _)| config.feeds[id.0].content == Content::Policies) {
        projection.apply(Change::Put(*id, object.clone()), &mut batch);
    }
    while let Some(candidates) = projection.job() {
        let outcome = settle(&candidates, async |selection| compiler.check(selection).await).await?;
        projection.take_outcome(outcome, &mut batch);
    }
    problems.extend(
        projection.problems().iter().map(|problem| format!("{}: {}", problem.subject, problem.message)),
    );
    let good = projection.last_good();
    let modules = good.values().flat_map(|texts| &texts.modules).collect();
    if good.is_empty() {
        bail!("no policies in {}: {}", dir.display(), problems.join("; "));
    }
    let entrypoints = match &config.fields {
        Selection::Auto { entrypoints, .. } => &entrypoints[..],
        Selection::Given(_) => &[],
    };
    let plan = compiler.plan(&modules, entrypoints).await?;
    let plan = plan.context("fields are found by a real OPA only: give --opa-bin")?;
    let reads = analyze::reads(&plan);

    let mut text = String::new();
    for (id, feed) in replicated {
        let Content::Resource(place) = &feed.content else { continue };
        let root: Vec<_> = place.relative().split('/').collect();
        let (resource, root) = root.split_last().context("a place has a name")?;
        let is_cluster_scoped = feed.scope == Scope::Cluster;
        let found = Kept::of_reads(&reads, [(place.clone(), Some(is_cluster_scoped))]);
        let found = found.of(place);
        let (mut whole, mut less) = (0, 0);
        for (_, object) in objects.iter().filter(|(of, _)| *of == id) {
            let mut cut = Vec::new();
            found.cut(std::str::from_utf8(&object.json)?, &mut cut)?;
            whole += object.json.len();
            less += cut.len();
        }
        writeln!(text, "{}: {less} of {whole} bytes", feed.resource)?;
        let readers = readers(
            &reads,
            root.len() + if is_cluster_scoped { 2 } else { 3 },
            &[root, &[resource]].concat(),
        );
        for line in lines(found) {
            let reader = readers.get(line.trim_end_matches('…')).map_or("", String::as_str);
            writeln!(text, "  {line:<50} {reader}")?;
        }
    }
    for problem in problems {
        writeln!(text, "refused: {problem}")?;
    }
    Ok(text)
}

fn lines(fields: &Fields) -> Vec<String> {
    if fields.is_all() {
        return vec!["…".into()];
    }
    fields.to_string().lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// Who reads each path first: `ns/configmap/key:row:col`. What is read whole comes before the rest.
fn readers(reads: &Reads, object: usize, names: &[&str]) -> BTreeMap<String, String> {
    let mut readers = BTreeMap::new();
    let is = |step: &Step, name: &str| match step {
        Step::Name(held) => **held == *name,
        Step::Any => true,
    };
    for extent in [Extent::Whole, Extent::Shallow] {
        for (place, _, site) in reads.iter().filter(|(_, of, _)| *of == extent) {
            let Some(site) = site else { continue };
            if place.iter().zip(names).all(|(step, name)| is(step, name)) {
                let mut fields = Fields::default();
                fields.insert(place.get(object..).unwrap_or_default(), Extent::Shallow);
                let path = fields.to_string().trim().to_owned();
                readers.entry(path).or_insert_with(|| format!("{}:{}:{}", site.file, site.row, site.col));
            }
        }
    }
    readers
}
