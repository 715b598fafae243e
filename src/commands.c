/*
 * commands.c
 *		Commands of the server that concern sending, although they are not ours.
 *
 * Hooks run inside other people's statements: they note what is to be done, here
 * or at commit, and never raise an error or change what the command does.
 */
#include "postgres.h"

#include "catalog/objectaccess.h"
#include "catalog/pg_db_role_setting.h"
#include "catalog/pg_extension.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "commands/extension.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "tcop/utility.h"

#include "commands.h"
#include "send.h"
#include "shmem.h"

static ProcessUtility_hook_type previous_utility_hook = NULL;
static object_access_hook_type previous_object_access_hook = NULL;

/* The database that a command needs without anybody connected; NULL: none. */
static const char *
database_in_demand(Node *statement)
{
	ListCell   *cell;

	if (IsA(statement, DropdbStmt))
		return ((DropdbStmt *) statement)->dbname;
	if (IsA(statement, RenameStmt) && ((RenameStmt *) statement)->renameType == OBJECT_DATABASE)
		return ((RenameStmt *) statement)->subname;
	if (!IsA(statement, CreatedbStmt))
		return NULL;
	foreach(cell, ((CreatedbStmt *) statement)->options)
	{
		DefElem    *option = lfirst_node(DefElem, cell);

		if (strcmp(option->defname, "template") == 0 && option->arg != NULL)
			return defGetString(option);
	}
	return NULL;
}

static void
make_way(Node *statement)
{
	const char *name = database_in_demand(statement);
	SentdmSlot *slot;

	if (name == NULL)
		return;
	slot = sentdm_slot(get_database_oid(name, true), false);
	if (slot != NULL && OidIsValid(slot->database))
		sentdm_slot_ask_to_leave(slot);
}

/*
 * A prepared transaction is committed by a command of its own, often by another
 * session, which knows nothing of its messages: have the worker look.  And an
 * idle worker must not be in the way of a command that needs the database for
 * itself.
 */
static void
on_utility(PlannedStmt *pstmt, const char *query, bool read_only_tree,
		   ProcessUtilityContext context, ParamListInfo params,
		   QueryEnvironment *environment, DestReceiver *dest, QueryCompletion *completion)
{
	Node	   *statement = pstmt->utilityStmt;
	bool		commit_prepared = IsA(statement, TransactionStmt) &&
	((TransactionStmt *) statement)->kind == TRANS_STMT_COMMIT_PREPARED;
	SentdmSlot *slot;

	make_way(statement);
	if (previous_utility_hook)
		previous_utility_hook(pstmt, query, read_only_tree, context, params, environment, dest, completion);
	else
		standard_ProcessUtility(pstmt, query, read_only_tree, context, params, environment, dest, completion);

	if (commit_prepared && (slot = sentdm_slot(MyDatabaseId, false)) != NULL)
		sentdm_slot_control(slot);
}

/*
 * The extension goes: nothing is enabled here from the commit on.  And a worker
 * has to learn of changed settings of its database, which reach only processes
 * that start afterwards.
 */
static void
on_object_access(ObjectAccessType access, Oid class, Oid object, int sub_id, void *arg)
{
	if (previous_object_access_hook)
		previous_object_access_hook(access, class, object, sub_id, arg);

	if (access == OAT_DROP && class == ExtensionRelationId &&
		object == get_extension_oid("sentdm", true))
		sentdm_enable_at_commit(false);
	else if (access == OAT_POST_ALTER && class == DbRoleSettingRelationId)
		sentdm_settings_at_commit();
}

void
sentdm_commands_init(void)
{
	previous_utility_hook = ProcessUtility_hook;
	ProcessUtility_hook = on_utility;
	previous_object_access_hook = object_access_hook;
	object_access_hook = on_object_access;
}
