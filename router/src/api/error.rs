//! Errors as clients see them: the OpenAI error object, a status code, and `Retry-After` where it helps.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use plan::fleet::Stopped;
use serde_json::{Value, json};

use crate::edge::{StreamError, SubmitError};
use crate::encode::{ChatError, EncodeError, TokenizerError};

/// An answer that is an error.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// `type` of the error object.
    pub(crate) kind: &'static str,
    /// Stable, low-cardinality `code` of the error object.
    pub(crate) code: &'static str,
    /// Name of the parameter at fault.
    pub(crate) param: Option<String>,
    pub(crate) message: String,
    pub(crate) retry_after_seconds: Option<u64>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::NOT_FOUND if code == "model_not_found" => "invalid_request_error",
            s if s.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        Self { status, kind, code, param: None, message: message.into(), retry_after_seconds: None }
    }

    /// A parameter at fault.
    pub(crate) fn parameter(name: &str, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        error.param = Some(name.to_owned());
        error
    }

    /// The request took longer than allowed.
    pub(crate) fn deadline(seconds: u64) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "deadline_exceeded", format!("the request took longer than the limit of {seconds} s"))
    }

    /// The server is to stop, and the rest of a request did not come.
    pub(crate) fn stopping() -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "the server is stopping and the rest of the body did not come");
        Self { retry_after_seconds: Some(RETRY_NOT_READY_SECONDS), ..error }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// The `{"error": …}` object.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }

    /// The gRPC form.
    pub(crate) fn into_grpc(self) -> tonic::Status {
        use tonic::Code;
        let code = match self.status {
            StatusCode::BAD_REQUEST => Code::InvalidArgument,
            StatusCode::NOT_FOUND => Code::NotFound,
            StatusCode::TOO_MANY_REQUESTS => Code::ResourceExhausted,
            StatusCode::SERVICE_UNAVAILABLE if STOPPED.contains(&self.code) => Code::FailedPrecondition,
            StatusCode::SERVICE_UNAVAILABLE => Code::Unavailable,
            StatusCode::REQUEST_TIMEOUT => Code::DeadlineExceeded,
            _ => Code::Internal,
        };
        tonic::Status::new(code, self.message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self.code);
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(e: SubmitError) -> Self {
        let message = e.to_string();
        let with = |status, code, retry| Self { retry_after_seconds: retry, ..Self::new(status, code, message.clone()) };
        match e {
            SubmitError::UnknownModel(_) | SubmitError::UnknownAdapter { .. } => {
                Self { param: Some("model".to_owned()), ..with(StatusCode::NOT_FOUND, "model_not_found", None) }
            }
            SubmitError::QueueFull { retry_after_seconds, .. } => {
                with(StatusCode::TOO_MANY_REQUESTS, "queue_full", Some(retry_after_seconds))
            }
            SubmitError::Queue { .. } => with(StatusCode::SERVICE_UNAVAILABLE, e.reason(), Some(RETRY_NOT_READY_SECONDS)),
            SubmitError::Stopped(_, why) => with(StatusCode::SERVICE_UNAVAILABLE, stopped(why), None),
            SubmitError::TooLong { .. } => with(StatusCode::BAD_REQUEST, "context_length_exceeded", None),
            _ => with(StatusCode::SERVICE_UNAVAILABLE, "model_not_ready", Some(RETRY_NOT_READY_SECONDS)),
        }
    }
}

/// When to try again if no replica is ready: about how long a small model takes to load.
const RETRY_NOT_READY_SECONDS: u64 = 5;

/// Codes for a model that has no replicas because none are wanted. Waiting does not help: there is no `Retry-After`, and no code of gRPC
/// upon which clients try again.
const STOPPED: [&str; 2] = ["model_suspended", "model_scaled_to_zero"];

fn stopped(why: Stopped) -> &'static str {
    match why {
        Stopped::Suspended => STOPPED[0],
        Stopped::ScaledToZero => STOPPED[1],
    }
}

impl From<StreamError> for ApiError {
    fn from(e: StreamError) -> Self {
        match e {
            StreamError::Deadline(seconds) => Self::deadline(seconds),
            StreamError::Stopped(_, why) => Self::new(StatusCode::SERVICE_UNAVAILABLE, stopped(why), e.to_string()),
            StreamError::NoAdapter(_) => {
                Self { param: Some("model".to_owned()), ..Self::new(StatusCode::NOT_FOUND, e.reason(), e.to_string()) }
            }
            StreamError::AdapterFailed { .. } | StreamError::NoReplica(_) | StreamError::Queue(_) | StreamError::Stopping => {
                let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, e.reason(), e.to_string());
                Self { retry_after_seconds: Some(RETRY_NOT_READY_SECONDS), ..error }
            }
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, e.reason(), e.to_string()),
        }
    }
}

impl From<ChatError> for ApiError {
    fn from(e: ChatError) -> Self {
        let code = match e {
            ChatError::NoTemplate => "no_chat_template",
            _ => "invalid_value",
        };
        Self { param: Some("messages".to_owned()), ..Self::new(StatusCode::BAD_REQUEST, code, e.to_string()) }
    }
}

impl From<EncodeError> for ApiError {
    fn from(e: EncodeError) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", e.to_string())
    }
}

impl From<TokenizerError> for ApiError {
    fn from(e: TokenizerError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, e.reason(), e.to_string())
    }
}
