//! What the API server asks of a webhook about a pod that is made, and what it is answered: AdmissionReview v1 of
//! admission.k8s.io, with a JSON Patch (RFC 6902).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::{Namespace, Outcome, Settings, inject_pod};

const VERSION: &str = "admission.k8s.io/v1";

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

/// No review of this kind, as a sentence for whoever sent it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoReview(String);

impl Reviewer {
    /// Answers an AdmissionReview.
    pub fn review(&self, body: &[u8]) -> Result<Reviewed, NoReview> {
        let review: Value = serde_json::from_slice(body)
            .map_err(|error| NoReview(format!("the body is no JSON: {error}")))?;
        if review["kind"] != "AdmissionReview" || review["apiVersion"] != VERSION {
            return Err(NoReview(format!(
                "not an AdmissionReview of {VERSION}: the webhook's admissionReviewVersions must be [v1]"
            )));
        }
        let request = &review["request"];
        let Some(uid) = request["uid"].as_str() else {
            return Err(NoReview("request.uid is missing".to_owned()));
        };
        let mut response = json!({"uid": uid, "allowed": true});
        let verdict = self.judge(request, &mut response);
        Ok(Reviewed {
            answer: json!({"apiVersion": VERSION, "kind": "AdmissionReview", "response": response}),
            verdict,
            pod: name(request),
        })
    }

    fn judge(&self, request: &Value, response: &mut Value) -> Verdict {
        if let Some(reason) = self.not_asked(request) {
            return Verdict::Skipped(reason);
        }
        let before = &request["object"];
        let mut pod = before.clone();
        // Its namespace's annotations would have to be asked of the API server.
        match inject_pod(&mut pod, &Namespace::default(), &self.settings) {
            Ok(Outcome::Injected(injected)) => {
                let patch = json_patch::diff(before, &pod);
                let patch = serde_json::to_vec(&patch).unwrap_or_default();
                response["patchType"] = json!("JSONPatch");
                response["patch"] = json!(STANDARD.encode(patch));
                if !injected.warnings.is_empty() {
                    let warnings = injected.warnings.iter().map(|said| format!("weir: {said}"));
                    response["warnings"] = warnings.collect();
                }
                Verdict::Injected
            }
            Ok(Outcome::Skipped(reason)) => Verdict::Skipped(reason.to_string()),
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
