// Package broker is the MQTT broker of both the cloud and the edge: mochi as
// the protocol engine, and on its hooks our own routing, acknowledgement,
// delivery queues, access rules and Pebble store.
//
//	b, err := broker.Open(broker.Options{Dir: dir, Node: "plant-7", Authenticate: auth})
//	err = b.Listen("127.0.0.1:1883")
//	err = b.Publish(ctx, broker.Message{Topic: t, Payload: p, Retain: true})
//	defer b.Close()
//
// One goroutine, the core, takes every publish in order: it asks the
// interceptors, writes one batch, and only after the batch is on the disk
// acknowledges and hands the messages to the subscribers' queues. So an
// acknowledged message is stored, messages of one publisher keep their order,
// and an interceptor sees a state that nobody else is changing.
//
// A publish that is refused gets a reason code and a reason string. MQTT 3.1.1
// has no negative acknowledgement: there, a message that its client may not
// publish is acknowledged and dropped, counted and logged [MQTT 3.1.1, 3.3.5-2];
// one that could not be stored ends the connection, as it must be sent again.
//
// A client id belongs to its identity. A connection that takes one over waits
// until all that was the other's is gone, its Will included. Sessions end with
// their connection; subscriptions are QoS 1 at most.
//
// Memory is bounded per connection (outbound queue, replays, subscriptions,
// publishes under way); retained messages are bounded by the disk's reserve only.
//
// Locks: a connection's mu and a client's mu are leaves, Broker.mu comes before
// neither. retained.mu is held for map work only. Nothing is sent or stored
// under any of them.
package broker
