use super::*;
use crate::opa::fake_opa::FakeOpa;

type Texts<'a> = &'a [(&'a str, &'a str)];

fn put(texts: Texts) -> ModuleChanges {
    texts.iter().map(|(id, text)| ((*id).to_owned(), Some((*text).to_owned()))).collect()
}

fn ids(texts: &BTreeMap<String, String>) -> Vec<&str> {
    texts.keys().map(String::as_str).collect()
}

async fn opa_with(texts: Texts<'_>) -> (FakeOpa, OpaClient) {
    let (fake, opa) = FakeOpa::start().await;
    let modules = texts.iter().map(|(id, text)| ((*id).to_owned(), (*text).to_owned()));
    fake.with(|world| world.modules = modules.collect());
    (fake, opa)
}

async fn check(before: Texts<'_>, wanted: Texts<'_>, rejected: &[&str], removals: &[&str]) {
    let (fake, opa) = opa_with(before).await;
    let results = ModuleApplier::default().apply(&opa, &put(wanted)).await.unwrap();
    assert_eq!(ids(&results.rejected), rejected, "{before:?} {wanted:?}");
    assert_eq!(results.absent, BTreeSet::new(), "{before:?} {wanted:?}");
    let mut expected: BTreeMap<&str, &str> = before.iter().copied().collect();
    expected.extend(wanted.iter().copied().filter(|(id, _)| !rejected.contains(id)));
    fake.with(|world| {
        let texts = world.modules.iter().map(|(id, text)| (id.as_str(), text.as_str()));
        assert!(texts.eq(expected), "{before:?} {wanted:?}: {:?}", world.modules);
        let removed = world.log.iter().filter_map(|request| request.strip_prefix("DELETE policies/"));
        let removed: Vec<_> = removed.filter_map(|request| request.strip_suffix(" 200")).collect();
        assert_eq!(removed, removals, "{before:?} {wanted:?}");
    });
}

#[tokio::test]
async fn modules_are_applied_and_rejected_ones_remove_no_others() {
    let pair: Texts = &[("a", "has x"), ("b", "has y")];
    // The first module needs the second.
    check(&[], &[("a", "calls y"), ("b", "has y")], &[], &[]).await;
    check(&[("a", "has x")], &[("a", "calls y"), ("b", "has y")], &[], &[]).await;
    // Both fail by themselves.
    check(pair, &[("a", "has x\nodd"), ("b", "has y\nodd")], &["a", "b"], &[]).await;
    check(pair, &[("a", "has x\ncalls z"), ("b", "has y\nodd"), ("c", "has q")], &["a", "b"], &[]).await;
    // An unchanged module has the rule.
    check(pair, &[("c", "has x"), ("d", "has y")], &["c", "d"], &[]).await;
    // Modules exchange rules.
    check(pair, &[("a", "has y"), ("b", "has x")], &[], &["a"]).await;
    check(
        &[("a", "has x"), ("b", "has y"), ("c", "has z")],
        &[("a", "has z"), ("b", "has x"), ("c", "has y")],
        &[],
        &["a"],
    )
    .await;
    // A function is renamed with its caller.
    check(&[("a", "calls f"), ("b", "has f")], &[("a", "calls g"), ("b", "has g")], &[], &["a"]).await;
    let before: Texts = &[("a", "calls f"), ("b", "calls f"), ("c", "has f")];
    check(before, &[("a", "calls g"), ("b", "calls g"), ("c", "has g")], &[], &["a", "b"]).await;
    // One caller fails by itself.
    let wanted: Texts = &[("a", "calls g"), ("b", "calls g\nodd"), ("c", "has g")];
    check(before, wanted, &["a", "b", "c"], &["a", "b", "a", "c"]).await;
    let pairs: Texts = &[("a", "has x"), ("b", "has y"), ("c", "has z"), ("d", "has q")];
    let wanted: Texts = &[("a", "odd"), ("b", "has y\nhas x"), ("c", "has q"), ("d", "has z")];
    check(pairs, wanted, &["a", "b"], &["a", "c"]).await;
    // A rule moves from a module that fails by itself.
    let wanted: Texts = &[("a", "has z\nodd"), ("b", "has y\nhas x")];
    check(&[("a", "has x\nhas z"), ("b", "has y")], wanted, &["a", "b"], &["a"]).await;
}

#[tokio::test]
async fn rejected_changes_are_retried_only_if_that_may_help() {
    let (fake, opa) = opa_with(&[("a", "has x"), ("b", "has y")]).await;
    let mut applier = ModuleApplier::default();
    let mut changes = put(&[("a", "broken"), ("b", "calls z")]);
    for _ in 0..2 {
        let results = applier.apply(&opa, &changes).await.unwrap();
        assert_eq!(ids(&results.rejected), ["a", "b"]);
    }
    assert_eq!(fake.log(), ["PUT policies/a 400", "PUT policies/b 400"]);
    changes.extend(put(&[("c", "has q")]));
    applier.apply(&opa, &changes).await.unwrap();
    let log = fake.log();
    assert!(log.iter().all(|request| !request.contains("policies/a")), "{log:?}");
    assert!(log.contains(&"PUT policies/b 400".to_owned()), "{log:?}");
    changes.extend(put(&[("c", "has z")]));
    assert_eq!(ids(&applier.apply(&opa, &changes).await.unwrap().rejected), ["a"]);
    changes.extend(put(&[("a", "has x\ncalls y")]));
    assert_eq!(ids(&applier.apply(&opa, &changes).await.unwrap().rejected), ["a"]);
    fake.log();
    applier.reset();
    applier.apply(&opa, &changes).await.unwrap();
    assert!(fake.log().contains(&"PUT policies/a 400".to_owned()));
}

#[tokio::test]
async fn errors_leave_nothing_removed() {
    let before: Texts = &[("a", "has x\nhas q"), ("b", "has y"), ("c", "has z")];
    for wanted in [&[("a", "has y"), ("b", "has x")][..], &[("a", "has q\nodd"), ("b", "has y\nhas x")]] {
        let mut errors = 0;
        loop {
            let (fake, opa) = opa_with(before).await;
            fake.with(|world| world.fails_after = Some(errors));
            let mut applier = ModuleApplier::default();
            let result = applier.apply(&opa, &put(wanted)).await;
            if result.is_ok() {
                break;
            }
            fake.with(|world| world.fails_after = None);
            assert_eq!(applier.roll_back(&opa).await.unwrap(), BTreeSet::new());
            let texts = fake.with(|world| world.modules.clone());
            let texts = texts.iter().map(|(id, text)| (id.as_str(), text.as_str()));
            assert!(texts.eq(before.iter().copied()), "after {errors} requests");
            errors += 1;
        }
        assert!(errors > 5, "{wanted:?}: {errors} requests include no trial");
    }
}
