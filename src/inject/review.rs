//! What the API server asks of a webhook about a pod that is made, and what it is answered: AdmissionReview v1 of
//! admission.k8s.io, with a JSON Patch (RFC 6902). Must not know how it is asked: `cli::webhook` is the server.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::{Changed, Namespace, Settings, inject, sidecar};

const VERSION: &str = "admission.k8s.io/v1";
/// Of JSON, in a review: a pod has some hundreds. One may take a hundred times the memory that it takes in the text.
const MAX_VALUES: usize = 20_000;

/// What becomes of a pod that weir cannot be put into as it is asked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OnUnfit {
    /// It is made without weir, and whoever makes it is warned.
    Admit,
    /// It is not made.
    Refuse,
}

/// What pods are reviewed by.
#[derive(Debug, Clone)]
pub struct Reviewer {
    pub settings: Settings,
    pub on_unfit: OnUnfit,
    /// The webhook's own: injected there, it could wait for itself.
    pub own_namespace: Option<String>,
}

/// An answer, and what there is to say of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Reviewed {
    pub answer: Value,
    pub verdict: Verdict,
    /// The pod, as far as it has a name yet.
    pub pod: String,
}

/// What became of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Injected,
    /// It is let in as it is, for this reason.
    Skipped(String),
    /// It cannot be injected, for this reason: it is refused, or let in with a warning.
    Unfit(String),
}

/// Why there is no review, as a sentence for whoever sent it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoReview {
    #[error("the review has more than {MAX_VALUES} JSON values")]
    TooMuch,
    #[error("{0}")]
    Other(String),
}

impl Reviewer {
    /// Answers an AdmissionReview.
    pub fn review(&self, body: &[u8]) -> Result<Reviewed, NoReview> {
        if values(body) > MAX_VALUES {
            return Err(NoReview::TooMuch);
        }
        let review: Value = serde_json::from_slice(body)
            .map_err(|error| NoReview::Other(format!("the body is no JSON: {error}")))?;
        if review["kind"] != "AdmissionReview" || review["apiVersion"] != VERSION {
            return Err(NoReview::Other(format!(
                "not an AdmissionReview of {VERSION}: the webhook's admissionReviewVersions must be [v1]"
            )));
        }
        let request = &review["request"];
        let Some(uid) = request["uid"].as_str() else {
            return Err(NoReview::Other("request.uid is missing".to_owned()));
        };
        let mut response = json!({"uid": uid, "allowed": true});
        let verdict = self.judge(request, &mut response);
        let mut answer = json!({"apiVersion": VERSION, "kind": "AdmissionReview"});
        answer["response"] = response;
        Ok(Reviewed {
            answer,
            verdict,
            pod: name(request),
        })
    }

    fn judge(&self, request: &Value, response: &mut Value) -> Verdict {
        if let Some(reason) = self.not_asked(request) {
            return Verdict::Skipped(reason);
        }
        let before = &request["object"];
        let workload = sidecar::workload(before);
        // Its namespace's annotations would have to be asked of the API server.
        let namespace = Namespace::default();
        match inject(workload.as_deref(), before, &namespace, &self.settings) {
            Ok(Changed::Injected(pod, injected)) => {
                let patch = patch(before, pod).to_string();
                response["patchType"] = json!("JSONPatch");
                response["patch"] = Value::String(STANDARD.encode(patch));
                if !injected.warnings.is_empty() {
                    let warnings = injected.warnings.iter().map(|said| format!("weir: {said}"));
                    response["warnings"] = warnings.collect();
                }
                Verdict::Injected
            }
            Ok(Changed::No(reason)) => Verdict::Skipped(reason.to_string()),
            Err(unfit) => {
                let said = format!("weir is not injected: {unfit}");
                match self.on_unfit {
                    OnUnfit::Admit => response["warnings"] = json!([said]),
                    OnUnfit::Refuse => {
                        response["allowed"] = json!(false);
                        response["status"] =
                            json!({"code": 422, "reason": "Invalid", "message": said});
                    }
                }
                Verdict::Unfit(unfit.to_string())
            }
        }
    }

    /// Why this is not for the webhook, where its configuration lets more through than pods that are made.
    fn not_asked(&self, request: &Value) -> Option<String> {
        let namespace = request["namespace"].as_str();
        if namespace.is_some() && namespace == self.own_namespace.as_deref() {
            return Some("the webhook's own namespace".to_owned());
        }
        let kind = &request["kind"];
        let is_pod = kind["group"] == "" && kind["kind"] == "Pod";
        let is_made = request["operation"] == "CREATE" && request["subResource"].is_null();
        (!is_pod || !is_made).then(|| "no pod that is made".to_owned())
    }
}

/// How many values a JSON text has, unless it is none: each but the first comes behind a comma, or begins a list or a map.
fn values(text: &[u8]) -> usize {
    let (mut values, mut quoted, mut escaped) = (1, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b',' | b'[' | b'{' if !quoted => values += 1,
            _ => (),
        }
    }
    values
}

/// What makes `after` of `before`: the lists and maps that have changed, as wholes. Told value by value, each with its path, they could take any
/// multiple of what was sent.
fn patch(before: &Value, mut after: Value) -> Value {
    let mut patch = Vec::new();
    let mut add = |path: String, value: &mut Value| {
        let mut change = json!({"op": "add", "path": path});
        change["value"] = value.take();
        patch.push(change);
    };
    for part in ["metadata", "spec"] {
        if before[part].is_null() {
            add(format!("/{part}"), &mut after[part]);
            continue;
        }
        let now = after[part].as_object_mut().into_iter().flatten();
        for (key, value) in now {
            if before[part].get(key) != Some(&*value) {
                add(format!("/{part}/{key}"), value);
            }
        }
    }
    Value::Array(patch)
}

/// `NAMESPACE/NAME`. Pods of a ReplicaSet have no name yet, only the beginning of one.
fn name(request: &Value) -> String {
    let object = &request["object"]["metadata"];
    let namespace = request["namespace"].as_str().unwrap_or_default();
    match (request["name"].as_str(), object["generateName"].as_str()) {
        (Some(name), _) if !name.is_empty() => format!("{namespace}/{name}"),
        (_, Some(prefix)) => format!("{namespace}/{prefix}…"),
        (_, None) => format!("{namespace}/?"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::inject_pod;
    use super::*;

    fn request(pod: Value) -> Value {
        json!({
            "uid": "a-1", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "operation": "CREATE",
            "namespace": "shop", "name": null, "object": pod,
        })
    }

    fn pod() -> Value {
        json!({
            "metadata": {"generateName": "web-5d9-"},
            "spec": {"containers": [{"name": "web", "image": "web:1", "ports": [{"name": "http", "containerPort": 8080}]}]},
        })
    }

    fn reviewed(request: &Value, on_unfit: OnUnfit) -> Reviewed {
        let reviewer = Reviewer {
            settings: Settings::default(),
            on_unfit,
            own_namespace: Some("weir".to_owned()),
        };
        let review = json!({"apiVersion": VERSION, "kind": "AdmissionReview", "request": request});
        let body = serde_json::to_vec(&review).unwrap();
        reviewer.review(&body).unwrap()
    }

    #[test]
    fn the_patch_makes_what_injection_makes() {
        let said = reviewed(&request(pod()), OnUnfit::Refuse);
        assert_eq!(
            (said.verdict, said.pod.as_str()),
            (Verdict::Injected, "shop/web-5d9-…")
        );
        let response = &said.answer["response"];
        assert_eq!(
            (&response["uid"], &response["allowed"]),
            (&json!("a-1"), &json!(true))
        );
        assert_eq!(response["patchType"], "JSONPatch");
        let patch = STANDARD
            .decode(response["patch"].as_str().unwrap())
            .unwrap();
        let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
        let (mut patched, mut injected) = (pod(), pod());
        json_patch::patch(&mut patched, &patch).unwrap();
        inject_pod(&mut injected, &Namespace::default(), &Settings::default()).unwrap();
        assert_eq!(patched, injected);
        // What is injected is left as it is: the API server may ask again.
        let again = reviewed(&request(patched), OnUnfit::Refuse);
        assert_eq!(
            again.verdict,
            Verdict::Skipped("already injected".to_owned())
        );
        assert_eq!(
            again.answer["response"],
            json!({"uid": "a-1", "allowed": true})
        );
    }

    #[test]
    fn an_unfit_pod_is_admitted_with_a_warning_or_refused_with_the_reason() {
        let mut unfit = pod();
        unfit["metadata"]["annotations"] = json!({"weir.dev/app-port": "none"});
        let admitted = &reviewed(&request(unfit.clone()), OnUnfit::Admit).answer["response"];
        assert_eq!(admitted["allowed"], true);
        assert_eq!(admitted["patch"], Value::Null);
        let warning = admitted["warnings"][0].as_str().unwrap();
        assert!(
            warning.starts_with("weir is not injected: metadata.annotations"),
            "{warning}"
        );
        let refused = &reviewed(&request(unfit), OnUnfit::Refuse).answer["response"];
        assert_eq!(refused["allowed"], false);
        assert_eq!(refused["status"]["message"], warning);
    }

    #[test]
    fn values_are_counted_but_not_in_texts() {
        for (text, count) in [
            ("1", 1),
            ("[1, 2]", 3),
            (r#"{"a": "[,{", "b\",": []}"#, 4),
            (r#"["\\", "\"", {}]"#, 5),
        ] {
            assert_eq!(values(text.as_bytes()), count, "{text}");
        }
        let reviewer = Reviewer {
            settings: Settings::default(),
            on_unfit: OnUnfit::Refuse,
            own_namespace: None,
        };
        let text = |items| json!(vec![0; items]).to_string();
        let review = |items| reviewer.review(text(items).as_bytes()).unwrap_err();
        assert_eq!(review(MAX_VALUES), NoReview::TooMuch);
        assert_ne!(review(MAX_VALUES - 2), NoReview::TooMuch);
    }

    #[test]
    fn others_are_let_be() {
        for (key, value) in [
            ("namespace", json!("weir")),
            ("operation", json!("UPDATE")),
            ("subResource", json!("eviction")),
            (
                "kind",
                json!({"group": "apps", "version": "v1", "kind": "Deployment"}),
            ),
        ] {
            let mut request = request(pod());
            request[key] = value;
            let said = reviewed(&request, OnUnfit::Refuse);
            assert!(matches!(said.verdict, Verdict::Skipped(_)), "{key}");
            assert_eq!(
                said.answer["response"],
                json!({"uid": "a-1", "allowed": true})
            );
        }
    }
}
