//! The interface's description.

use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;

/// What types and paths of the module `api` say. A file, since the compiler takes 15 seconds for what derives it; a test derives it
/// and compares the two.
const DESCRIPTION: &str = include_str!("openapi.json");

/// Describes the interface.
pub async fn describe() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], DESCRIPTION)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;
    use utoipa::OpenApi;
    use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};

    use super::*;
    use crate::api::{
        chat, completions, guarded_routes, kept, models, open_routes, states, tokens, watch,
    };

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
    struct Derived;

    /// The scheme of keys.
    struct Key;

    impl utoipa::Modify for Key {
        fn modify(&self, description: &mut utoipa::openapi::OpenApi) {
            let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
            let components = description.components.get_or_insert_default();
            components.add_security_scheme("key", scheme);
        }
    }

    #[test]
    fn the_description_is_what_types_and_paths_say() {
        let mut derived = Derived::openapi().to_pretty_json().unwrap();
        derived.push('\n');
        if derived != DESCRIPTION {
            let fresh = std::env::temp_dir().join("openapi.json");
            std::fs::write(&fresh, derived).unwrap();
            panic!(
                "src/api/openapi.json is not what types and paths say: compare it with {} and copy that",
                fresh.display()
            );
        }
    }

    #[test]
    fn every_path_is_described_and_no_other() {
        let description: Value = serde_json::from_str(DESCRIPTION).unwrap();
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
