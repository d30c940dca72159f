// Package broker is the MQTT broker of both the cloud and the edge: mochi reads
// and decodes, and on top of it are our own routing, sessions, acknowledgements,
// access rules and Pebble store.
//
//	b, err := broker.Open(broker.Options{Dir: dir, Node: "plant-7", Authenticate: auth})
//	err = b.Listen("127.0.0.1:1883")
//	err = b.Publish(ctx, broker.Message{Topic: t, Payload: p, Retain: true})
//	defer b.Close()
//
// One goroutine, the core, takes everything that changes state in order:
// publishes, subscriptions, clients that come and go. It asks the interceptors,
// finds the subscribers, writes one batch, and only after the batch is on the
// disk acknowledges and hands the messages to the sessions. What came meanwhile
// is the next batch, so that under load many messages share one sync. So an
// acknowledged message is stored, messages of one publisher keep their order, an
// interceptor sees a state that nobody else is changing, and a subscription
// misses nothing and gets nothing twice between SUBACK and the next publish.
//
// A session that outlives its connection (session expiry above 0, or clean
// session 0 of MQTT 3.1.1) is in the store: its subscriptions before SUBACK, its
// messages of QoS 1 and 2 before their publisher's PUBACK or PUBREC, PUBREC of
// its client before PUBREL, PUBREL before PUBCOMP. A message has a number in its
// session's queue, and its packet id comes from the number, so that both are the
// same after a crash and the order of sending again is that of the numbers. What
// a client acknowledges is taken out of the store a little later: after a crash
// a message of QoS 1 may come again, with DUP; one of QoS 2 does not.
//
// A stored session has a page of its queue in memory and the rest on the disk. A
// connection that is not read from costs its session the place in the queue and
// nobody else anything: a publisher never waits for a subscriber. Beyond
// Options.Queue the oldest messages go, counted, or, for a publisher that came by
// a listener with queue-full=refuse, the newest is refused. Other sessions end
// with their connection, have their queue in memory, and are disconnected with
// 0x97 when it is full.
//
// A publish that is refused gets a reason code and a reason string. MQTT 3.1.1
// has no negative acknowledgement: there, a message that its client may not
// publish is acknowledged and dropped, counted and logged [MQTT 3.1.1, 3.3.5-2];
// one that could not be stored ends the connection, as it must be sent again.
//
// A client id belongs to its identity. A connection that takes one over waits
// until all that was the other's is gone, its Will included.
//
// Who owns what: a session's fields are the core's, but for those under its mu,
// which it shares with the connection's reader and writer. Locks: a session's mu,
// a connection's mu, Broker.mu, inbox.mu and retained.mu are leaves. Nothing is sent
// or stored under any of them.
package broker
