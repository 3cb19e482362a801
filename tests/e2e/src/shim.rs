//! A shim's own socket: the Task calls as containerd makes them, for what `ctr` cannot say or does not show.

use std::{fs, path::Path};

use protobuf::Message;

/// A connection to one shim.
#[derive(Clone)]
pub struct Shim {
    client: ttrpc::Client,
    address: String,
    service: &'static str,
}

/// What every containerd up to 1.7 calls; the messages are the same in version 3.
const VERSION_2: &str = "containerd.task.v2.Task";
/// What containerd 2 calls.
const VERSION_3: &str = "containerd.task.v3.Task";

impl Shim {
    /// Connects to the shim of the bundle directory, where its address lies for a containerd that starts anew.
    pub fn connect(bundle: &Path) -> Self {
        let file = bundle.join("address");
        let address =
            fs::read_to_string(&file).unwrap_or_else(|error| panic!("cannot read {}: {error}", file.display()));
        Self::at(address.trim())
    }

    /// Connects to `address`, as `start` prints it.
    pub fn at(address: &str) -> Self {
        let client =
            ttrpc::Client::connect(address).unwrap_or_else(|error| panic!("cannot connect to {address:?}: {error}"));
        Self { client, address: address.to_owned(), service: VERSION_2 }
    }

    /// Another connection to the same shim.
    pub fn again(&self) -> Self {
        Self { service: self.service, ..Self::at(&self.address) }
    }

    /// The same shim, called as containerd 2 calls it.
    pub fn version_3(&self) -> Self {
        Self { service: VERSION_3, ..self.clone() }
    }

    /// Makes one call and takes any answer, or none.
    pub fn tell(&self, method: &str, question: &impl Message) {
        let _ = self.client.request(self.request(method, question));
    }

    /// Makes one call.
    ///
    /// # Errors
    /// The status that the shim answered.
    ///
    /// # Panics
    /// If the shim does not answer at all.
    pub fn call<A: Message>(&self, method: &str, question: &impl Message) -> Result<A, ttrpc::Status> {
        match self.client.request(self.request(method, question)) {
            Ok(answer) => Ok(A::parse_from_bytes(&answer.payload).expect("the answer is of its type")),
            Err(ttrpc::Error::RpcStatus(status)) => Err(status),
            Err(error) => panic!("{method}: {error}"),
        }
    }

    fn request(&self, method: &str, question: &impl Message) -> ttrpc::Request {
        let mut request = ttrpc::Request::new();
        request.service = self.service.to_owned();
        request.method = method.to_owned();
        request.timeout_nano = crate::wait::STEP.as_nanos() as i64;
        request.payload = question.write_to_bytes().expect("the message is complete");
        request
    }
}
