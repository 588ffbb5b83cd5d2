//! A handler that panics answers `INTERNAL`. Without this its client would wait for ever: ttrpc
//! sends nothing.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;

use async_trait::async_trait;
use futures::FutureExt;
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::proto::{Request, Response};

use crate::error::Error;

struct Guard(Box<dyn MethodHandler + Send + Sync>);

#[async_trait]
impl MethodHandler for Guard {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let method = request.method.clone();
        match AssertUnwindSafe(self.0.handler(context, request))
            .catch_unwind()
            .await
        {
            Ok(result) => result,
            Err(_) => {
                let error = Error::internal(format!(
                    "{method} failed inside the shim: its log has the panic"
                ));
                Ok(ttrpc::Error::from(error).into())
            }
        }
    }
}

/// Puts a guard around every method.
pub fn guarded(services: HashMap<String, Service>) -> HashMap<String, Service> {
    services
        .into_iter()
        .map(|(name, service)| {
            let methods = service.methods.into_iter().map(
                |(name, method)| -> (_, Box<dyn MethodHandler + Send + Sync>) {
                    (name, Box::new(Guard(method)))
                },
            );
            (
                name,
                Service {
                    methods: methods.collect(),
                    streams: service.streams,
                },
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use ttrpc::Code;

    use super::*;

    struct Panics;

    #[async_trait]
    impl MethodHandler for Panics {
        async fn handler(&self, _: TtrpcContext, _: Request) -> ttrpc::Result<Response> {
            panic!("on purpose");
        }
    }

    #[tokio::test]
    async fn a_panic_is_an_answer() {
        let context = TtrpcContext {
            mh: Default::default(),
            metadata: HashMap::new(),
            timeout_nano: 0,
            connection_data: Default::default(),
        };
        let request = Request {
            method: "State".into(),
            ..Default::default()
        };
        let response = Guard(Box::new(Panics))
            .handler(context, request)
            .await
            .unwrap();
        assert_eq!(response.status.code(), Code::INTERNAL);
        assert!(response.status.message().starts_with("State failed"));
    }
}
