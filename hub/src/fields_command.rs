//! `opa-hub fields`: fields of replicated objects that the policies of a folder read.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::args::config::{Config, Source};
use crate::fields::cost::{self, Field, Sample};
use crate::fields::masks::FieldMasks;
use crate::model::{Change, Content, InputId, NamespaceSelector, Object};
use crate::policy::check::Compiler;
use crate::policy::reads::{Analyst, Found};
use crate::policy::resolve::settle;
use crate::projection::Projector;
use crate::snapshot::Batch;
use crate::source::folder::{self, Contents};
use crate::spec::BundleSpec;

/// Interval of progress reports.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

pub(crate) async fn report(config: &Config) -> anyhow::Result<String> {
    let Source::Folder(dir) = &config.source else {
        bail!("reading policies failed: a cluster is not supported; set --manifests DIR")
    };
    let mut problems = Vec::new();
    let mut specs: Vec<BundleSpec> = config.flags.iter().cloned().collect();
    let in_file = config
        .documents
        .as_deref()
        .map(|path| folder::read_file(path).map_err(|error| anyhow::anyhow!("{}: {error}", path.display())));
    let in_folder = folder::read_once(dir, &[BundleSpec::documents()])?;
    let in_folder = in_folder.objects.into_iter().map(|(_, object)| object);
    for document in in_file.transpose()?.into_iter().flatten().chain(in_folder) {
        match BundleSpec::parse(&document) {
            Ok(spec) if specs.iter().any(|other| other.name == spec.name) => {
                problems.push(format!("Bundle {}: another bundle has this name; rename one", spec.name));
            }
            Ok(spec) => specs.push(spec),
            Err(error) => problems.push(format!("Bundle {}: {error}", document.key.name)),
        }
    }
    let mut text = String::new();
    for spec in &specs {
        if specs.len() > 1 {
            writeln!(text, "bundle {}", spec.name)?;
        }
        match bundle_report(dir, spec, config).await {
            Ok(report) => text.push_str(&report),
            Err(error) if specs.len() > 1 => problems.push(format!("bundle {}: {error:#}", spec.name)),
            Err(error) => return Err(error),
        }
    }
    for problem in problems {
        writeln!(text, "rejected: {problem}")?;
    }
    Ok(text)
}

async fn bundle_report(dir: &Path, spec: &BundleSpec, config: &Config) -> anyhow::Result<String> {
    let compiler = Compiler::find(config.opa.as_deref(), spec.dialect).await?;
    let Contents { objects, mut problems } = folder::read_once(dir, &spec.feeds)?;

    let mut projection = Projector::new(spec, FieldMasks::default());
    let mut batch = Batch::default();
    for (id, object) in objects.iter().filter(|(id, _)| spec.feeds[id.0].content == Content::PolicyRegistry) {
        projection.apply(Change::Put(*id, object.clone()), &mut batch);
    }
    projection.retry_refused(&mut batch);
    while let Some(candidates) = projection.job() {
        let outcome = settle(&candidates, async |selection| compiler.check(selection).await).await?;
        if let Some(failure) = &outcome.failure {
            bail!("policy check failed in {}: {}", dir.display(), failure.message);
        }
        projection.take_outcome(outcome, &mut batch);
    }
    problems.extend(
        projection.problems().iter().map(|problem| format!("{}: {}", problem.subject, problem.message)),
    );
    let good = projection.last_good();
    let modules = good.values().flat_map(|texts| &texts.modules).collect();
    if good.is_empty() {
        bail!("no policies found in {}: {}", dir.display(), problems.join("; "));
    }
    let mut analyst = Analyst::new(PROGRESS_INTERVAL);
    let Found { reads, opaque, unused, .. } = loop {
        let found = analyst.reads(&compiler, &modules, &spec.fields.entrypoints).await?;
        let found = found.context("field analysis needs an opa program; set --opa-bin")?;
        if found.left.is_empty() {
            break found;
        }
        eprintln!("analysing {} more packages", found.left.len());
        analyst.allow(PROGRESS_INTERVAL);
    };

    let mut text = String::new();
    for (id, feed) in (0..).map(InputId).zip(&spec.feeds) {
        let Content::Resource(path) = &feed.content else { continue };
        let scope = Some(feed.scope == NamespaceSelector::ClusterScoped);
        let kept = FieldMasks::of_reads(&reads, [(path.clone(), scope)]);
        let fields = kept.of(path);
        let sample = |(_, object): &(InputId, Object)| {
            let (namespace, whole_bytes) = (object.key.namespace.clone(), object.json.len());
            fields.cut_object(&object.json).map(|kept| Sample { namespace, whole_bytes, kept })
        };
        let objects =
            objects.iter().filter(|(feed, _)| *feed == id).map(sample).collect::<Result<Vec<_>, _>>()?;
        let found = cost::resource(path, scope, fields, Some(&reads), &objects);
        let opa = cost::opa_bytes(found.json_bytes, found.objects) >> 20;
        writeln!(
            text,
            "{}: {} of {} bytes, an OPA of about {opa} MB",
            feed.resource, found.json_bytes, found.whole_bytes
        )?;
        for Field { path, json_bytes, readers } in found.fields {
            writeln!(text, "  {path:<44} {json_bytes:>12}  {}", readers.join(" "))?;
        }
    }
    for (decision, reason) in opaque {
        writeln!(text, "unknown: fields that data{decision} reads, so whole objects are served: {reason}")?;
    }
    for id in unused {
        writeln!(text, "unused: no entrypoint uses {id}: fields that only its rules read are not served")?;
    }
    for problem in problems {
        writeln!(text, "rejected: {problem}")?;
    }
    Ok(text)
}
