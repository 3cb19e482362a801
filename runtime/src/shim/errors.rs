//! Errors as containerd gets them: a gRPC code that it acts on, and a sentence that `ctr` or kubelet shows.

use ttrpc::{Code, get_status};

use crate::{
    pod::lifecycle::Refusal,
    stdio::{StdioError, logger::LoggerError},
    vm::allotment::AllotmentError,
};

/// A task request that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TaskError {
    code: Code,
    message: String,
    silence: Option<Silence>,
}

/// Why the agent has not said what became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The connection to it broke: the machine has ended, or is about to.
    Lost,
    /// The call's time was up: it may still succeed in the guest.
    Deadline,
}

/// What the guest says is cut to this many characters.
const MAX_GUEST_TEXT: usize = 1024;

impl TaskError {
    fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), silence: None }
    }

    /// NOT_FOUND.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NOT_FOUND, message)
    }

    /// ALREADY_EXISTS.
    pub fn already_exists(message: impl Into<String>) -> Self {
        Self::new(Code::ALREADY_EXISTS, message)
    }

    /// FAILED_PRECONDITION.
    pub fn failed_precondition(message: impl Into<String>) -> Self {
        Self::new(Code::FAILED_PRECONDITION, message)
    }

    /// INVALID_ARGUMENT.
    pub fn invalid_argument(message: impl Into<String>) -> Self {
        Self::new(Code::INVALID_ARGUMENT, message)
    }

    /// UNIMPLEMENTED.
    pub fn unimplemented(verb: &str) -> Self {
        Self::new(Code::UNIMPLEMENTED, format!("{verb} is not implemented by io.containerd.caisson.v2"))
    }

    /// UNAVAILABLE: it cannot be done now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Code::UNAVAILABLE, message)
    }

    /// UNAVAILABLE: the machine is not there (any more), so nothing runs in it.
    pub fn lost(message: impl Into<String>) -> Self {
        Self { silence: Some(Silence::Lost), ..Self::unavailable(message) }
    }

    /// DEADLINE_EXCEEDED: the agent has not answered `call` in time, and may still do what was asked.
    pub fn deadline(call: &str) -> Self {
        let message = format!("the agent has not answered {call} in time");
        Self { silence: Some(Silence::Deadline), ..Self::new(Code::DEADLINE_EXCEEDED, message) }
    }

    /// INTERNAL: a fault of the shim's own.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::INTERNAL, message)
    }

    /// What the agent answered to `call`. Its words come from the guest: cut, and without control characters.
    pub fn from_agent(call: &str, error: &ttrpc::Error) -> Self {
        let clean = |text: &str| -> String {
            text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_GUEST_TEXT).collect()
        };
        match error {
            ttrpc::Error::RpcStatus(status) => match status.code() {
                code @ (Code::NOT_FOUND
                | Code::ALREADY_EXISTS
                | Code::FAILED_PRECONDITION
                | Code::INVALID_ARGUMENT
                | Code::UNIMPLEMENTED) => Self::new(code, clean(status.message())),
                Code::DEADLINE_EXCEEDED => Self::deadline(call),
                Code::UNAVAILABLE | Code::RESOURCE_EXHAUSTED | Code::ABORTED | Code::CANCELLED => {
                    Self::unavailable(format!("the agent cannot {call} now: {}", clean(status.message())))
                }
                _ => Self::internal(format!("the agent's {call} failed: {}", clean(status.message()))),
            },
            other => Self::lost(format!("the agent did not answer {call}: {}", clean(&other.to_string()))),
        }
    }

    /// The same error with what was being done in front.
    pub fn context(self, what: &str) -> Self {
        Self { message: format!("{what}: {}", self.message), ..self }
    }

    /// The code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// None if what became of the call is known.
    pub fn silence(&self) -> Option<Silence> {
        self.silence
    }
}

impl From<Refusal> for TaskError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Finished => Self::not_found(refusal.to_string()),
            Refusal::State { .. }
            | Refusal::Container { .. }
            | Refusal::NotStarted(_)
            | Refusal::Exec(_)
            | Refusal::NotCreated => Self::failed_precondition(refusal.to_string()),
        }
    }
}

impl From<AllotmentError> for TaskError {
    fn from(error: AllotmentError) -> Self {
        let message = error.to_string();
        match error {
            AllotmentError::Malformed(_) | AllotmentError::Resource(_) => Self::invalid_argument(message),
            AllotmentError::Cgroup(_) => Self::failed_precondition(message),
        }
    }
}

impl From<StdioError> for TaskError {
    fn from(error: StdioError) -> Self {
        let message = error.to_string();
        match error {
            StdioError::Dial(_) => Self::unavailable(message),
            StdioError::Logger(LoggerError::NotReady { .. }) => Self::failed_precondition(message),
            StdioError::Open { .. } | StdioError::File { .. } | StdioError::Target { .. } | StdioError::Logger(_) => {
                Self::invalid_argument(message)
            }
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        Self::RpcStatus(get_status(error.code, error.message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_codes_pass_and_its_words_are_tamed() {
        let said = ttrpc::Error::RpcStatus(get_status(Code::NOT_FOUND, "no\x1b[2J such\nfile".to_string()));
        let message = TaskError::from_agent("Start", &said);
        assert_eq!((message.code(), message.to_string().as_str()), (Code::NOT_FOUND, "no [2J such file"));
        let long = ttrpc::Error::RpcStatus(get_status(Code::INTERNAL, "x".repeat(100_000)));
        assert!(TaskError::from_agent("Start", &long).to_string().len() < 2000);
        let gone = TaskError::from_agent("Kill", &ttrpc::Error::RemoteClosed);
        assert_eq!((gone.code(), gone.silence()), (Code::UNAVAILABLE, Some(Silence::Lost)));
    }

    /// A guest can answer whatever it likes: containerd gets a code that it knows what to do with.
    #[test]
    fn every_code_of_the_agent_becomes_one_that_containerd_acts_on() {
        use protobuf::Enum;
        for code in Code::VALUES.iter().copied() {
            let said = ttrpc::Error::RpcStatus(get_status(code, "words"));
            let message = TaskError::from_agent("Stats", &said);
            let expected = match code {
                Code::NOT_FOUND
                | Code::ALREADY_EXISTS
                | Code::FAILED_PRECONDITION
                | Code::INVALID_ARGUMENT
                | Code::UNIMPLEMENTED
                | Code::DEADLINE_EXCEEDED => code,
                Code::UNAVAILABLE | Code::RESOURCE_EXHAUSTED | Code::ABORTED | Code::CANCELLED => Code::UNAVAILABLE,
                _ => Code::INTERNAL,
            };
            assert_eq!(message.code(), expected, "{code:?}");
            let silence = (code == Code::DEADLINE_EXCEEDED).then_some(Silence::Deadline);
            assert_eq!(message.silence(), silence, "{code:?}: an agent that is busy has answered");
        }
    }
}
