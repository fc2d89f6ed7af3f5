//! `opa-hub fields`: which fields of replicated objects the policies of a folder read, without a server.

use std::fmt::Write as _;

use anyhow::{Context as _, bail};

use crate::bundle::forecast::{self, Field, Sample};
use crate::bundle::kept::Kept;
use crate::bundle::project::Projection;
use crate::bundle::view::Batch;
use crate::config::{Config, Selection, Source};
use crate::model::{Change, Content, Feed, FeedId, Object, Scope};
use crate::policy::analyze;
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
        let scope = Some(feed.scope == Scope::Cluster);
        let kept = Kept::of_reads(&reads, [(place.clone(), scope)]);
        let fields = kept.of(place);
        let cut = |(_, object): &(FeedId, Object)| {
            let (namespace, whole_bytes) = (object.key.namespace.clone(), object.json.len());
            fields.cut_object(&object.json).map(|kept| Sample { namespace, whole_bytes, kept })
        };
        let objects = objects.iter().filter(|(of, _)| *of == id).map(cut).collect::<Result<Vec<_>, _>>()?;
        let found = forecast::resource(place, scope, fields, Some(&reads), &objects);
        let opa = forecast::opa_bytes(found.json_bytes, found.objects) >> 20;
        writeln!(
            text,
            "{}: {} of {} bytes, an OPA of about {opa} MB",
            feed.resource, found.json_bytes, found.whole_bytes
        )?;
        for Field { path, json_bytes, readers } in found.fields {
            writeln!(text, "  {path:<44} {json_bytes:>12}  {}", readers.join(" "))?;
        }
    }
    for problem in problems {
        writeln!(text, "refused: {problem}")?;
    }
    Ok(text)
}
