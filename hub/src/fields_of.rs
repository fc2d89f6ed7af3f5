//! `opa-hub fields`: which fields of replicated objects the policies of a folder read, without a server.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::bundle::forecast::{self, Field, Sample};
use crate::bundle::kept::Kept;
use crate::bundle::project::Projection;
use crate::bundle::spec::Spec;
use crate::bundle::view::Batch;
use crate::config::{Config, Source};
use crate::model::{Change, Content, FeedId, Object, Scope};
use crate::policy::check::Compiler;
use crate::policy::reads::{Analyst, Found};
use crate::policy::settle::settle;
use crate::source::folder::{self, Contents};

/// Time until the analysis of many packages tells how far it is.
const ANALYSIS_TURN: Duration = Duration::from_secs(10);

/// The report, for people: by bundle and resource what is read and by whom, and how many bytes that leaves.
pub async fn report(config: &Config) -> anyhow::Result<String> {
    let Source::Folder(dir) = &config.source else {
        bail!("give --manifests DIR: a cluster is not read for this")
    };
    let mut problems = Vec::new();
    let mut specs: Vec<Spec> = config.flags.iter().cloned().collect();
    let of_file = config
        .documents
        .as_deref()
        .map(|path| folder::read_file(path).map_err(|error| anyhow::anyhow!("{}: {error}", path.display())));
    let of_folder = folder::read_once(dir, &[Spec::documents()])?;
    let of_folder = of_folder.objects.into_iter().map(|(_, object)| object);
    for document in of_file.transpose()?.into_iter().flatten().chain(of_folder) {
        match Spec::parse(&document) {
            Ok(spec) if specs.iter().any(|other| other.name == spec.name) => {
                problems.push(format!("Bundle {}: a bundle of this name is given already", spec.name));
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
        // With one bundle there is nothing else to show.
        match bundle(dir, spec, config).await {
            Ok(found) => text.push_str(&found),
            Err(error) if specs.len() > 1 => problems.push(format!("bundle {}: {error:#}", spec.name)),
            Err(error) => return Err(error),
        }
    }
    for problem in problems {
        writeln!(text, "refused: {problem}")?;
    }
    Ok(text)
}

async fn bundle(dir: &Path, spec: &Spec, config: &Config) -> anyhow::Result<String> {
    let compiler = Compiler::find(config.opa.as_deref(), spec.dialect).await?;
    let Contents { objects, mut problems } = folder::read_once(dir, &spec.feeds)?;

    let mut projection = Projection::new(spec, Kept::default());
    let mut batch = Batch::default();
    for (id, object) in objects.iter().filter(|(id, _)| spec.feeds[id.0].content == Content::Policies) {
        projection.apply(Change::Put(*id, object.clone()), &mut batch);
    }
    projection.retry_refused(&mut batch);
    while let Some(candidates) = projection.job() {
        let outcome = settle(&candidates, async |selection| compiler.check(selection).await).await?;
        if let Some(failure) = &outcome.failure {
            bail!("cannot check the policies in {}: {}", dir.display(), failure.message);
        }
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
    let mut analyst = Analyst::new(ANALYSIS_TURN);
    let Found { reads, opaque, unused, .. } = loop {
        let found = analyst.reads(&compiler, &modules, &spec.fields.entrypoints).await?;
        let found = found.context("fields are found by a real OPA only: give --opa-bin")?;
        if found.left.is_empty() {
            break found;
        }
        eprintln!("{} packages are still to be analysed", found.left.len());
        analyst.allow(ANALYSIS_TURN);
    };

    let mut text = String::new();
    for (id, feed) in (0..).map(FeedId).zip(&spec.feeds) {
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
    for (decision, reason) in opaque {
        writeln!(text, "unknown: the fields that data{decision} reads, so objects travel whole: {reason}")?;
    }
    for id in unused {
        writeln!(text, "unused: no entrypoint uses {id}, so fields that only its rules read are left out")?;
    }
    for problem in problems {
        writeln!(text, "refused: {problem}")?;
    }
    Ok(text)
}
