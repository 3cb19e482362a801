//! Numbers of the kernel's interface (include/uapi/linux) that the libc crate lacks.

// if_link.h
pub const IFLA_ADDRESS: u16 = 1;
pub const IFLA_IFNAME: u16 = 3;
pub const IFLA_MTU: u16 = 4;
pub const IFLA_LINK: u16 = 5;
pub const IFLA_MASTER: u16 = 10;
pub const IFLA_TXQLEN: u16 = 13;
pub const IFLA_LINKINFO: u16 = 18;
pub const IFLA_AF_SPEC: u16 = 26;
pub const IFLA_NUM_TX_QUEUES: u16 = 31;
pub const IFLA_LINK_NETNSID: u16 = 37;
pub const IFLA_PARENT_DEV_NAME: u16 = 56;
pub const IFLA_INFO_KIND: u16 = 1;
pub const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
pub const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

// if_addr.h
pub const IFA_RT_PRIORITY: u16 = 9;
pub const IFA_FLAGS: u16 = 8;

// rtnetlink.h
pub const RTA_VIA: u16 = 18;
pub const RTA_PREF: u16 = 20;
pub const RTA_ENCAP: u16 = 22;
pub const RTA_EXPIRES: u16 = 23;
pub const RTAX_CC_ALGO: u16 = 16;
pub const RTM_F_CLONED: u32 = 0x200;
pub const RTNH_F_ONLINK: u8 = 4;

// fib_rules.h
pub const FRA_PRIORITY: u16 = 6;
pub const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
pub const FRA_TABLE: u16 = 15;
pub const FRA_PROTOCOL: u16 = 21;
pub const FR_ACT_TO_TBL: u8 = 1;

// pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h
pub const TC_H_CLSACT: u32 = 0xffff_fff1;
pub const TC_H_CLSACT_INGRESS: u32 = 0xffff_fff2;
pub const TC_H_CLSACT_EGRESS: u32 = 0xffff_fff3;
pub const TCA_MATCHALL_ACT: u16 = 2;
pub const TCA_U32_SEL: u16 = 5;
pub const TCA_U32_ACT: u16 = 7;
pub const TC_U32_TERMINAL: u8 = 1;
pub const TCA_ACT_KIND: u16 = 1;
pub const TCA_ACT_OPTIONS: u16 = 2;
pub const TCA_MIRRED_PARMS: u16 = 2;
pub const TC_ACT_STOLEN: i32 = 4;
pub const TCA_EGRESS_REDIR: i32 = 1;

// netlink.h: struct nlmsgerr's attributes
pub const NLMSGERR_ATTR_MSG: u16 = 1;
