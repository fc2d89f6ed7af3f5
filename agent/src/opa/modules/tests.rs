use super::*;
use crate::fake_opa::FakeOpa;

type Texts<'a> = &'a [(&'a str, &'a str)];

fn put(texts: Texts) -> Changes {
    texts.iter().map(|(id, text)| ((*id).to_owned(), Some((*text).to_owned()))).collect()
}

fn ids(texts: &BTreeMap<String, String>) -> Vec<&str> {
    texts.keys().map(String::as_str).collect()
}

/// An OPA that holds these modules.
async fn opa_with(texts: Texts<'_>) -> (FakeOpa, Opa) {
    let (fake, opa) = FakeOpa::start().await;
    let modules = texts.iter().map(|(id, text)| ((*id).to_owned(), (*text).to_owned()));
    fake.with(|world| world.modules = modules.collect());
    (fake, opa)
}

async fn check(held: Texts<'_>, wanted: Texts<'_>, refused: &[&str], removals: &[&str]) {
    let (fake, opa) = opa_with(held).await;
    let turned = Rounds::default().turn(&opa, &put(wanted)).await.unwrap();
    assert_eq!(ids(&turned.refused), refused, "{held:?} {wanted:?}");
    assert_eq!(turned.absent, BTreeSet::new(), "{held:?} {wanted:?}");
    let mut expected: BTreeMap<&str, &str> = held.iter().copied().collect();
    expected.extend(wanted.iter().copied().filter(|(id, _)| !refused.contains(id)));
    fake.with(|world| {
        let texts = world.modules.iter().map(|(id, text)| (id.as_str(), text.as_str()));
        assert!(texts.eq(expected), "{held:?} {wanted:?}: {:?}", world.modules);
        let removed = world.log.iter().filter_map(|request| request.strip_prefix("DELETE policies/"));
        let removed: Vec<_> = removed.filter_map(|request| request.strip_suffix(" 200")).collect();
        assert_eq!(removed, removals, "{held:?} {wanted:?}");
    });
}

#[tokio::test]
async fn modules_go_in_and_refused_ones_take_no_others_out() {
    let pair: Texts = &[("a", "has x"), ("b", "has y")];
    // One needs the other, which comes later.
    check(&[], &[("a", "calls y"), ("b", "has y")], &[], &[]).await;
    check(&[("a", "has x")], &[("a", "calls y"), ("b", "has y")], &[], &[]).await;
    // Both are refused for themselves.
    check(pair, &[("a", "has x\nodd"), ("b", "has y\nodd")], &["a", "b"], &[]).await;
    check(pair, &[("a", "has x\ncalls z"), ("b", "has y\nodd"), ("c", "has q")], &["a", "b"], &[]).await;
    // A module that does not change has the rule.
    check(pair, &[("c", "has x"), ("d", "has y")], &["c", "d"], &[]).await;
    // They exchange rules.
    check(pair, &[("a", "has y"), ("b", "has x")], &[], &["a"]).await;
    check(
        &[("a", "has x"), ("b", "has y"), ("c", "has z")],
        &[("a", "has z"), ("b", "has x"), ("c", "has y")],
        &[],
        &["a"],
    )
    .await;
    // A function and its caller get another name.
    check(&[("a", "calls f"), ("b", "has f")], &[("a", "calls g"), ("b", "has g")], &[], &["a"]).await;
    let held: Texts = &[("a", "calls f"), ("b", "calls f"), ("c", "has f")];
    check(held, &[("a", "calls g"), ("b", "calls g"), ("c", "has g")], &[], &["a", "b"]).await;
    // One of the callers is refused for itself: to put all back, the new texts are removed.
    let wanted: Texts = &[("a", "calls g"), ("b", "calls g\nodd"), ("c", "has g")];
    check(held, wanted, &["a", "b", "c"], &["a", "b", "a", "c"]).await;
    // Another pair goes in all the same.
    let pairs: Texts = &[("a", "has x"), ("b", "has y"), ("c", "has z"), ("d", "has q")];
    let wanted: Texts = &[("a", "odd"), ("b", "has y\nhas x"), ("c", "has q"), ("d", "has z")];
    check(pairs, wanted, &["a", "b"], &["a", "c"]).await;
    // One takes over a rule of another one, which is refused for itself: both stay as they were.
    let wanted: Texts = &[("a", "has z\nodd"), ("b", "has y\nhas x")];
    check(&[("a", "has x\nhas z"), ("b", "has y")], wanted, &["a", "b"], &["a"]).await;
}

#[tokio::test]
async fn refused_changes_are_tried_again_only_where_that_may_help() {
    let (fake, opa) = opa_with(&[("a", "has x"), ("b", "has y")]).await;
    let mut rounds = Rounds::default();
    let mut changes = put(&[("a", "broken"), ("b", "calls z")]);
    for _ in 0..2 {
        let turned = rounds.turn(&opa, &changes).await.unwrap();
        assert_eq!(ids(&turned.refused), ["a", "b"]);
    }
    assert_eq!(fake.log(), ["PUT policies/a 400", "PUT policies/b 400"]);
    changes.extend(put(&[("c", "has q")]));
    rounds.turn(&opa, &changes).await.unwrap();
    let log = fake.log();
    assert!(log.iter().all(|request| !request.contains("policies/a")), "{log:?}");
    assert!(log.contains(&"PUT policies/b 400".to_owned()), "{log:?}");
    changes.extend(put(&[("c", "has z")]));
    assert_eq!(ids(&rounds.turn(&opa, &changes).await.unwrap().refused), ["a"]);
    changes.extend(put(&[("a", "has x\ncalls y")]));
    assert_eq!(ids(&rounds.turn(&opa, &changes).await.unwrap().refused), ["a"]);
    fake.log();
    rounds.forget();
    rounds.turn(&opa, &changes).await.unwrap();
    assert!(fake.log().contains(&"PUT policies/a 400".to_owned()));
}

#[tokio::test]
async fn an_error_leaves_nothing_removed() {
    let held: Texts = &[("a", "has x\nhas q"), ("b", "has y"), ("c", "has z")];
    for wanted in [&[("a", "has y"), ("b", "has x")][..], &[("a", "has q\nodd"), ("b", "has y\nhas x")]] {
        let mut errors = 0;
        loop {
            let (fake, opa) = opa_with(held).await;
            fake.with(|world| world.fails_after = Some(errors));
            let mut rounds = Rounds::default();
            let result = rounds.turn(&opa, &put(wanted)).await;
            if result.is_ok() {
                break;
            }
            fake.with(|world| world.fails_after = None);
            assert_eq!(rounds.put_back(&opa).await.unwrap(), BTreeSet::new());
            let texts = fake.with(|world| world.modules.clone());
            let texts = texts.iter().map(|(id, text)| (id.as_str(), text.as_str()));
            assert!(texts.eq(held.iter().copied()), "after {errors} requests");
            errors += 1;
        }
        assert!(errors > 5, "{wanted:?}: {errors} requests are no trial");
    }
}
