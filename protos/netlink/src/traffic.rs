//! tc(8): everything that arrives on one interface is sent on another. `clsact` gives the interface a place for filters, a filter
//! takes all packets, and the action `mirred` moves them.

use crate::{
    message::Message,
    uapi::{
        TC_ACT_STOLEN, TC_H_CLSACT, TC_H_CLSACT_EGRESS, TC_H_CLSACT_INGRESS, TC_U32_TERMINAL, TCA_ACT_KIND,
        TCA_ACT_OPTIONS, TCA_EGRESS_REDIR, TCA_MATCHALL_ACT, TCA_MIRRED_PARMS, TCA_U32_ACT, TCA_U32_SEL,
    },
};

/// The place of the filter among others of the interface, behind those of an administrator. Nobody else uses this one.
const PRIORITY: u32 = 0xca15;

/// The filter that takes all packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// `matchall`.
    MatchAll,
    /// `u32` with a mask that leaves nothing, for kernels without `matchall`.
    U32,
}

/// `struct tcmsg`.
fn header(interface: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut header = vec![0; 4];
    for value in [interface, handle, parent, info] {
        header.extend(value.to_ne_bytes());
    }
    header
}

/// The request that gives an interface a place for filters; EEXIST if it has one.
#[must_use]
pub fn add_clsact(interface: u32) -> Message {
    let header = header(interface, TC_H_CLSACT & 0xffff_0000, TC_H_CLSACT, 0);
    let mut message = Message::new(libc::RTM_NEWQDISC, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &header);
    message.text(libc::TCA_KIND, "clsact");
    message
}

/// The request that takes that place away, and all filters in it.
#[must_use]
pub fn remove_clsact(interface: u32) -> Message {
    let header = header(interface, TC_H_CLSACT & 0xffff_0000, TC_H_CLSACT, 0);
    Message::new(libc::RTM_DELQDISC, 0, &header)
}

fn filter(kind: u16, flags: i32, interface: u32) -> Message {
    // In the network's byte order.
    let every_protocol = u32::from((libc::ETH_P_ALL as u16).to_be());
    Message::new(kind, flags, &header(interface, 0, TC_H_CLSACT_INGRESS, PRIORITY << 16 | every_protocol))
}

/// The request that sends on `to` what arrives on `from`; EEXIST if that place among the filters is taken.
#[must_use]
pub fn add_redirect(from: u32, to: u32, kind: Filter) -> Message {
    let mut message = filter(libc::RTM_NEWTFILTER, libc::NLM_F_CREATE | libc::NLM_F_EXCL, from);
    match kind {
        Filter::MatchAll => {
            message.text(libc::TCA_KIND, "matchall").nested(libc::TCA_OPTIONS, |options| {
                options.nested(TCA_MATCHALL_ACT, |actions| mirred(actions, to));
            });
        }
        Filter::U32 => {
            message.text(libc::TCA_KIND, "u32").nested(libc::TCA_OPTIONS, |options| {
                // struct tc_u32_sel (16) with one struct tc_u32_key (16) of mask and value 0.
                let mut selector = [0; 32];
                (selector[0], selector[2]) = (TC_U32_TERMINAL, 1);
                options.bytes(TCA_U32_SEL, &selector).nested(TCA_U32_ACT, |actions| mirred(actions, to));
            });
        }
    }
    message
}

/// The request that removes the redirect.
#[must_use]
pub fn remove_redirect(from: u32) -> Message {
    filter(libc::RTM_DELTFILTER, 0, from)
}

/// The requests whose dumps are the filters in that place: of what arrives, and of what is sent.
#[must_use]
pub fn list_filters(interface: u32) -> [Message; 2] {
    let list = |parent| Message::new(libc::RTM_GETTFILTER, 0, &header(interface, 0, parent, 0));
    [list(TC_H_CLSACT_INGRESS), list(TC_H_CLSACT_EGRESS)]
}

fn mirred(actions: &mut Message, to: u32) {
    const FIRST: u16 = 1;
    // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex.
    let mut parameters = Vec::new();
    for value in [0, 0, TC_ACT_STOLEN.cast_unsigned(), 0, 0, TCA_EGRESS_REDIR.cast_unsigned(), to] {
        parameters.extend(value.to_ne_bytes());
    }
    actions.nested(FIRST, |action| {
        action.text(TCA_ACT_KIND, "mirred").nested(TCA_ACT_OPTIONS, |options| {
            options.bytes(TCA_MIRRED_PARMS, &parameters);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `tc` of iproute2 6.1 sends, without the message's header.
    const CLSACT: &str = "00000000 03000000 0000ffff f1ffffff 00000000 0b000100 636c7361 63740000";
    const MATCHALL: &str = "00000000 03000000 00000000 f2ffffff 000315ca 0d000100 6d617463 68616c6c 00000000 3c000200 \
        38000200 34000100 0b000100 6d697272 65640000 24000280 20000200 00000000 00000000 04000000 00000000 00000000 \
        01000000 02000000";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: String = hex.split_whitespace().collect();
        let pairs = digits.as_bytes().chunks(2);
        pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    #[test]
    fn the_place_for_filters_is_asked_for_as_tc_does() {
        let message = add_clsact(3);
        assert_eq!((message.kind, message.body()), (libc::RTM_NEWQDISC, bytes(CLSACT).as_slice()));
    }

    #[test]
    fn the_redirect_is_asked_for_as_tc_does() {
        let message = add_redirect(3, 2, Filter::MatchAll);
        let mut body = message.body().to_vec();
        // The types of the three outer attributes: tc does not say that they hold others, which is up to the sender here.
        for place in [39, 43, 47] {
            assert_eq!(body[place], 0x80);
            body[place] = 0;
        }
        assert_eq!((message.kind, body), (libc::RTM_NEWTFILTER, bytes(MATCHALL)));
    }
}
