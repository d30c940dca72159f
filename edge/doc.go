// Package edge is the agent: a node's own broker and store, the link to the
// cloud, the twin engine and the node's description, in one small process.
//
//	err := edge.Run(ctx, edge.Config{Node: "plant-7", Dir: "/var/lib/fairlead", MQTT: []string{"127.0.0.1:1883"}})
//
// It needs no cloud: without Cloud, or while the cloud is away, the bus, the
// mappers and the twins work from what is in the store.
package edge
