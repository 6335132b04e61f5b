"""What can be wanted of the network: EC2's verbs over VPCs, checked and written as EC2 does it.

An operation is a pure decision over a `Draft`, a transaction in the making: it reads rows
(`sandbox.store.vpc_rows`), refuses in EC2's words (`refusals`) or adds what it writes. `commit`
writes a draft whole or not at all, and decides again when somebody else was faster. So operations
compose: the default VPC is a dozen of them in one transaction, and an interface is taken in the one
that accepts its task.

    subnet = await commit(region, lambda draft: create_subnet(draft, vpc_id, "10.0.1.0/24"))

Who changes the shape of a VPC writes its ledger, so two of them conflict. Taking an interface does
not: it writes three rows that only others in the same subnet write (whose turn it is, the
interface, its link) and compares those that it read, so it conflicts with no other subnet.
"""

from sandbox.control.vpc.draft import Draft as Draft
from sandbox.control.vpc.draft import commit as commit
from sandbox.control.vpc.draft import load as load
from sandbox.control.vpc.region import Region as Region
