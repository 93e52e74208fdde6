//! Whether a pod with resources of its own, for all containers together, has room for weir's. Must not say what weir's are.

use serde_json::Value;

use super::Unfit;
use super::annotations::quantity;
use super::sidecar::CONTAINER;

/// Sums of decimal fractions are a little off.
const NEARLY: f64 = 1.0 + 1e-9;

/// Refuses a pod, with weir in it, that the API server would: one whose containers ask for more than itself, or one of whose containers, native
/// sidecars left out, may use more (`validatePodResourceConsistency`).
pub(super) fn refuse_full(pod: &Value) -> Result<(), Unfit> {
    let spec = &pod["spec"];
    let all = |list: &str| spec[list].as_array().into_iter().flatten();
    for name in ["cpu", "memory"] {
        let of = |container: &Value, kind: &str| amount(&container["resources"][kind][name]);
        if let Some((room, written)) = of(spec, "requests") {
            // Kubernetes takes a limit for the request that is missing.
            let asked_by = |it: &Value| {
                let asked = of(it, "requests").or_else(|| of(it, "limits"));
                asked.map_or(0.0, |(asked, _)| asked)
            };
            // A native sidecar stays from its place on, beside each step behind it and all containers.
            let (mut staying, mut most) = (0.0, 0.0_f64);
            for it in all("initContainers") {
                let beside = staying + asked_by(it);
                most = most.max(beside);
                if it["restartPolicy"] == "Always" {
                    staying = beside;
                }
            }
            let together = staying + all("containers").map(asked_by).sum::<f64>();
            if most.max(together) > room * NEARLY {
                return Err(Unfit::new(
                    format!("spec.resources.requests.{name}"),
                    format!(
                        "{written} is less than what all containers request, weir with them: raise it, or lower weir's by weir.dev/{name}-request"
                    ),
                ));
            }
        }
        let weir = all("containers").find(|container| container["name"] == CONTAINER);
        let limit = weir.and_then(|weir| of(weir, "limits"));
        if let (Some((room, written)), Some((limit, own))) = (of(spec, "limits"), limit)
            && limit > room * NEARLY
        {
            return Err(Unfit::new(
                format!("spec.resources.limits.{name}"),
                format!(
                    "{written} is less than weir's limit, {own}: raise it, or lower weir's by weir.dev/{name}-limit"
                ),
            ));
        }
    }
    Ok(())
}

/// A quantity, and how it is written; nothing for what is none, which Kubernetes refuses itself.
fn amount(value: &Value) -> Option<(f64, String)> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    Some((quantity("", &text).ok()?, text))
}
