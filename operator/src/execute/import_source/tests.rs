//! Secrets of an API server that changes them between two attempts.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use bascule_crds::VirtualMachine;
use bascule_crds::names::reason;
use bascule_operator_core::{Moment, PlannerMemory};
use bascule_types::ImageDigest;
use k8s_openapi::ByteString;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

use super::*;
use crate::context::OperatorContext;
use crate::execute::execution::Refused;

/// An API server that gives one of these answers to each request. What was requested is in the list.
fn api_server(answers: Vec<(u16, Value)>) -> (Client, Arc<Mutex<Vec<String>>>) {
    let (service, mut handle) =
        tower_test::mock::pair::<http::Request<Body>, http::Response<Body>>();
    let requests = Arc::new(Mutex::new(vec![]));
    let list = Arc::clone(&requests);
    let mut answers = VecDeque::from(answers);
    tokio::spawn(async move {
        while let Some((request, answer)) = handle.next_request().await {
            let (code, body) = answers.pop_front().unwrap();
            let line = format!("{} {}", request.method(), request.uri().path());
            list.lock().unwrap().push(line);
            let body = Body::from(serde_json::to_vec(&body).unwrap());
            answer.send_response(http::Response::builder().status(code).body(body).unwrap());
        }
    });
    (Client::new(service, "default"), requests)
}

fn secret_with(key: &str, value: &str) -> (u16, Value) {
    let mut data = json!({});
    data[key] = json!(ByteString(value.as_bytes().to_vec()));
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "images", "namespace": "shop"}, "data": data,
    });
    (200, secret)
}

fn failure(code: u16) -> (u16, Value) {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": "no",
    });
    (code, status)
}

fn vm(namespace: &str) -> VirtualMachine {
    serde_json::from_value(json!({
        "apiVersion": "bascule.dev/v1alpha1",
        "kind": "VirtualMachine",
        "metadata": {
            "name": "web", "namespace": namespace,
            "uid": "6fa459ea-ee8a-4ca4-894e-db77e160355e",
        },
        "spec": {
            "memory": "512Mi", "volume": "san",
            "disks": [{"name": "root", "size": "1Gi", "source": {"http": {
                "url": "https://images.example/root.qcow2", "sha256": "0".repeat(64),
                "authorizationFrom": {"secretKeyRef": {"name": "images", "key": "authorization"}},
            }}}],
        },
    }))
    .unwrap()
}

/// What each attempt gets, or the condition that it leaves; and what was requested of the API server.
async fn attempts(
    namespace: &str,
    answers: Vec<(u16, Value)>,
) -> (Vec<Result<ImportSource, String>>, Vec<String>) {
    let count = answers.len().max(1);
    let (client, requests) = api_server(answers);
    let context = OperatorContext::test(client);
    let vm = vm(namespace);
    let intent = crate::vm_intent::intent(&vm).unwrap();
    let bascule_operator_core::Origin::Image { source, .. } = &intent.disks[0].origin else {
        panic!("{:?}", intent.disks);
    };
    let mut outcomes = vec![];
    for _ in 0..count {
        let mut memory = PlannerMemory::default();
        let mut execution = Execution {
            context: &context,
            vm: &vm,
            intent: &intent,
            now: Moment(1000),
            memory: &mut memory,
        };
        let field = intent.disks[0].source_field();
        let outcome = execution.import_source(&field, source).await;
        outcomes.push(outcome.map_err(|error| {
            assert!(error.is::<Refused>(), "{error:#}");
            let (why, message) = memory.error.unwrap();
            assert_eq!(why, reason::SECRET_UNAVAILABLE);
            assert_eq!(error.to_string(), message);
            message
        }));
    }
    let requests = requests.lock().unwrap().clone();
    (outcomes, requests)
}

fn with_header(value: &str) -> ImportSource {
    ImportSource::Http {
        url: "https://images.example/root.qcow2".to_owned(),
        digest: ImageDigest::Sha256("0".repeat(64)),
        ca_bundle: None,
        authorization: Some(SourceAuthorization {
            secret: SecretKey {
                name: "images".to_owned(),
                key: "authorization".to_owned(),
            },
            value: HttpAuthorization::parse(value.as_bytes()).unwrap(),
        }),
    }
}

#[tokio::test]
async fn each_attempt_reads_the_secret_anew_and_uses_what_it_holds_then() {
    let (outcomes, requests) = attempts(
        "shop",
        vec![
            secret_with("authorization", "Bearer old\n"),
            secret_with("authorization", "Basic bmV3"),
        ],
    )
    .await;
    let wanted = [Ok(with_header("Bearer old")), Ok(with_header("Basic bmV3"))];
    assert_eq!(outcomes, wanted);
    let request = "GET /api/v1/namespaces/shop/secrets/images";
    assert_eq!(requests, [request, request]);
}

#[tokio::test]
async fn a_secret_that_cannot_be_used_is_a_condition_with_field_secret_and_key_until_it_can() {
    let cases = [
        (failure(404), "Secret \"images\" does not exist"),
        (
            failure(403),
            "the operator may not read Secret \"images\": grant get",
        ),
        (
            secret_with("password", "hunter2"),
            "Secret \"images\" has no key \"authorization\"",
        ),
        (
            secret_with("authorization", "\n"),
            "key \"authorization\" of Secret \"images\" is empty",
        ),
        (
            secret_with("authorization", "Bearer hunter2\r\nHost: other"),
            "key \"authorization\" of Secret \"images\" has a line break",
        ),
    ];
    let (mut answers, messages): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    answers.push(secret_with("authorization", "Bearer there"));
    let (mut outcomes, _) = attempts("shop", answers).await;
    assert_eq!(outcomes.pop(), Some(Ok(with_header("Bearer there"))));
    for (outcome, message) in outcomes.iter().zip(messages) {
        let said = outcome.as_ref().unwrap_err();
        let wanted = format!("spec.disks[root].source.http.authorizationFrom: {message}");
        assert!(said.starts_with(&wanted), "{said}");
        assert!(!said.contains("hunter2"), "{said}");
    }
}

/// There the operator may read the key of the certificate authority.
#[tokio::test]
async fn nothing_is_read_in_the_operators_own_namespace() {
    let (outcomes, requests) = attempts("bascule-system", vec![]).await;
    let said = outcomes[0].as_ref().unwrap_err();
    assert!(said.contains("the operator's own namespace"), "{said}");
    assert_eq!(requests, Vec::<String>::new());
}
