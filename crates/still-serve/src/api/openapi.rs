//! The interface's description.

use axum::Json;
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};

use super::{chat, completions, kept, models, states, tokens, watch};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "still serve",
        description = "OpenAI's interface to a linearized model. Fields that are not listed are ignored, unless they would \
                       change the answer: then they are refused by name."
    ),
    paths(
        models::list,
        models::get,
        completions::completions,
        chat::chat_completions,
        kept::kept,
        states::list,
        states::get,
        states::post,
        states::delete,
        tokens::tokenize,
        tokens::detokenize,
        tokens::info,
        watch::health,
        watch::metrics,
    ),
    modifiers(&Key)
)]
struct Description;

/// The scheme of keys.
struct Key;

impl utoipa::Modify for Key {
    fn modify(&self, description: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        let components = description.components.get_or_insert_default();
        components.add_security_scheme("key", scheme);
    }
}

/// Describes the interface.
pub async fn describe() -> Json<utoipa::openapi::OpenApi> {
    Json(Description::openapi())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::api::{guarded_routes, open_routes};

    #[test]
    fn every_path_is_described_and_no_other() {
        let description = serde_json::to_value(Description::openapi()).unwrap();
        let described: BTreeSet<String> =
            description["paths"].as_object().unwrap().keys().cloned().collect();
        let routes = open_routes().into_iter().chain(guarded_routes());
        let mut served: BTreeSet<String> = routes.map(|(path, _)| path.to_owned()).collect();
        // The page and the description are for readers, not for clients.
        served.remove("/");
        served.remove("/openapi.json");
        assert_eq!(described, served);
    }
}
