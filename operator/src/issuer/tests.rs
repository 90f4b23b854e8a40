//! Authorities and certificates on an API server that is a map of objects.

use serde_json::Value;

use super::*;
use crate::mock::{self, Objects, REFUSED};

const LIFETIMES: Lifetimes = Lifetimes {
    certificate: Duration::from_secs(600),
    renew: Duration::from_secs(60),
    authority: Duration::from_secs(3600),
    settle: Duration::from_secs(200),
};
const STORED: &str = "/api/v1/namespaces/system/secrets/skein-authorities";
const SECRET: &str = "/api/v1/namespaces/models/secrets/skein-router-identity";

async fn begin(objects: &Objects) -> Result<Issuer, IssueError> {
    Issuer::begin(mock::client(objects), "system", LIFETIMES, Arc::default()).await
}

fn wanted(owner: &str) -> Vec<Wanted> {
    let owner = OwnerReference { name: owner.to_owned(), uid: owner.to_owned(), ..OwnerReference::default() };
    let name = Name::Router { namespace: "models".to_owned() };
    vec![Wanted { secret: "skein-router-identity".to_owned(), name, labels: json!({}), owners: vec![owner] }]
}

fn get(objects: &Objects, path: &str) -> Value {
    objects.lock().expect("nobody panics with it").get(path).cloned().unwrap_or(Value::Null)
}

fn change(objects: &Objects, path: &str, change: impl FnOnce(&mut Value)) {
    change(objects.lock().expect("nobody panics with it").get_mut(path).expect("an object"));
}

fn text(secret: &Value, key: &str) -> String {
    let bytes: ByteString = serde_json::from_value(secret["data"][key].clone()).expect("bytes");
    String::from_utf8(bytes.0).expect("text")
}

/// As if the authorities had been made `seconds` earlier.
fn age_authorities(objects: &Objects, seconds: i64) {
    change(objects, STORED, |secret| {
        let mut all: Value = serde_json::from_str(&text(secret, KEPT)).expect("JSON");
        for authority in all.as_array_mut().expect("a list") {
            authority["created"] = json!(authority["created"].as_i64().expect("a time") - seconds);
        }
        secret["data"][KEPT] = json!(ByteString(all.to_string().into_bytes()));
    });
}

/// As if the certificate had been made `seconds` earlier.
fn age_certificate(objects: &Objects, seconds: i64) {
    change(objects, SECRET, |secret| {
        let issued = &mut secret["metadata"]["annotations"][NOTE[1]];
        *issued = json!((issued.as_str().and_then(|t| t.parse::<i64>().ok()).expect("a time") - seconds).to_string());
    });
}

#[tokio::test]
async fn operators_that_begin_at_once_and_later_have_the_same_authorities() {
    let objects = Objects::default();
    let (one, two) = tokio::join!(begin(&objects), begin(&objects));
    let (one, two) = (one.expect("authorities"), two.expect("authorities"));
    let stored = get(&objects, STORED);
    assert!(*one.authorities() == *two.authorities() && one.authorities().trusted().matches("BEGIN").count() == 1);
    one.certify("models", wanted("a")).await.expect("issued");
    let issued = get(&objects, SECRET);
    let later = begin(&objects).await.expect("authorities");
    for other in [&two, &later] {
        assert!(!other.turn().await.expect("nothing is due"));
        other.certify("models", wanted("a")).await.expect("it stands");
    }
    assert_eq!((get(&objects, STORED), get(&objects, SECRET)), (stored, issued), "who comes later writes nothing");
    // Control: authorities of another cluster are others.
    assert_ne!(begin(&Objects::default()).await.expect("authorities").authorities().trusted(), one.authorities().trusted());
}

#[tokio::test]
async fn a_certificate_is_replaced_when_it_is_old_and_when_trust_changes() {
    let objects = Objects::default();
    let issuer = begin(&objects).await.expect("authorities");
    let stand = issuer.certify("models", wanted("a")).await.expect("issued").expect("one");
    assert!(stand.again <= LIFETIMES.renew && stand.again > LIFETIMES.renew / 2);
    let first = get(&objects, SECRET);
    let identity = Identity::given([CERTIFICATE, KEY, TRUSTED].map(|file| text(&first, file)).each_ref().map(String::as_str));
    assert_eq!(identity.expect("an identity").name().to_string(), "spiffe://skein/ns/models/router");
    age_certificate(&objects, 59);
    issuer.forget();
    issuer.certify("models", wanted("a")).await.expect("it stands");
    assert_eq!(text(&get(&objects, SECRET), CERTIFICATE), text(&first, CERTIFICATE));
    age_certificate(&objects, 1);
    issuer.forget();
    issuer.certify("models", wanted("a")).await.expect("issued");
    let second = get(&objects, SECRET);
    assert_ne!(text(&second, CERTIFICATE), text(&first, CERTIFICATE));
    assert_eq!(text(&second, TRUSTED), text(&first, TRUSTED));

    age_authorities(&objects, 3600);
    assert!(issuer.turn().await.expect("another authority"));
    assert!(!issuer.turn().await.expect("nothing is due"));
    issuer.certify("models", wanted("a")).await.expect("issued");
    let third = get(&objects, SECRET);
    let (old, both) = (text(&second, TRUSTED), text(&third, TRUSTED));
    assert!(both.starts_with(&old) && both.matches("BEGIN").count() == 2, "the old authority is trusted, and the new one too");
    // The new one signs, and the old one goes once nothing that it signed is valid.
    age_authorities(&objects, 799);
    assert!(!issuer.turn().await.expect("nothing is due") || issuer.authorities().trusted() == both);
    age_authorities(&objects, 1);
    issuer.turn().await.expect("one goes");
    issuer.certify("models", wanted("a")).await.expect("issued");
    let last = text(&get(&objects, SECRET), TRUSTED);
    assert!(last.matches("BEGIN").count() == 1 && both.ends_with(&last));
}

#[tokio::test]
async fn a_secret_is_handed_over_as_it_is() {
    let objects = Objects::default();
    let issuer = begin(&objects).await.expect("authorities");
    issuer.certify("models", wanted("a")).await.expect("issued");
    let before = get(&objects, SECRET);
    issuer.certify("models", wanted("b")).await.expect("handed over");
    let after = get(&objects, SECRET);
    assert_eq!(after["metadata"]["ownerReferences"].as_array().map(|o| (o.len(), o[0]["uid"].clone())), Some((1, json!("b"))));
    assert_eq!(after["data"], before["data"]);
}

#[tokio::test]
async fn what_is_lost_is_restored_and_what_is_damaged_is_left() {
    let objects = Objects::default();
    let issuer = begin(&objects).await.expect("authorities");
    let before = text(&get(&objects, STORED), KEPT);
    objects.lock().expect("nobody panics with it").remove(STORED);
    assert!(!issuer.turn().await.expect("it is written again"), "nobody has to trust others");
    assert_eq!(text(&get(&objects, STORED), KEPT), before);
    change(&objects, STORED, |secret| secret["data"] = json!({}));
    let damaged = get(&objects, STORED);
    assert!(matches!(issuer.turn().await, Err(IssueError::Damaged(_))));
    assert!(begin(&objects).await.is_err_and(|error| error.to_string().contains("delete it")));
    assert_eq!(get(&objects, STORED), damaged);
    objects.lock().expect("nobody panics with it").insert(REFUSED.to_owned(), json!("/secrets/skein-router"));
    issuer.certify("models", wanted("a")).await.expect_err("it cannot be written");
}
