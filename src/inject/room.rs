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
    let stays = |container: &&Value| container["restartPolicy"] == "Always";
    for name in ["cpu", "memory"] {
        let of = |container: &Value, kind: &str| amount(&container["resources"][kind][name]);
        if let Some((room, written)) = of(spec, "requests") {
            let together = all("containers").chain(all("initContainers").filter(stays));
            // Kubernetes takes a limit for the request that is missing.
            let asked = together.filter_map(|it| of(it, "requests").or_else(|| of(it, "limits")));
            let asked: f64 = asked.map(|(asked, _)| asked).sum();
            if asked > room * NEARLY {
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
